"""The one contract that everything which decodes goes through: `logits, cache = model(ids, cache)`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Model(Protocol):
    """A cache-aware language model.

    ids: ALWAYS the whole sequence, (B, n) int64. Never a slice: the model decides what is new.
    cache: opaque to the caller. None to start, then whatever came back. None on every step is uncached decoding.

    Returns logits, (B, m, vocab) with m >= 1, whose last position is the prediction for the next token, and the
    cache for the next call. A cache may say in an attribute `reused` how many positions of the last call it
    already had.
    """

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]: ...
