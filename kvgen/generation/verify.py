"""Checking a cache while it is used: some steps are computed again, uncached, and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvgen.contract import Backend
from kvgen.errors import CacheError
from kvgen.rounding import LIMIT, distance, typical_floor


class VerifiedBackend(Backend):
    """A backend whose cached logits are held against uncached ones.

    every: check one cached step in so many, the first one included; None for the first one alone.
    on_wrong: called with what was found, after which everything is computed uncached. None to raise CacheError.
    """

    def __init__(self, inner: Backend, every: int | None, on_wrong: Callable[[str], None] | None = None) -> None:
        self._inner = inner
        self._every = every
        self._on_wrong = on_wrong
        self._cached_steps = 0
        self._uncached_only = False
        self.name, self.device, self.dtype = inner.name, inner.device, inner.dtype
        self.vocab_size, self.context_length = inner.vocab_size, inner.context_length
        self.rewinds, self.engine, self.position_bytes = inner.rewinds, inner.engine, inner.position_bytes

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        if self._uncached_only:
            return self._inner(ids, None)[0], None
        logits, new_cache = self._inner(ids, cache)
        if cache is None or not self._is_due():
            return logits, new_cache
        uncached, _ = self._inner(ids, None)
        if uncached[:, -1].isnan().any():
            return uncached, None  # the model's fault, not the cache's: the decoding loop says so
        apart = max(distance(*pair) for pair in zip(logits[:, -1], uncached[:, -1], strict=True))
        if apart == 0:
            return logits, new_cache
        floor = self._floor(ids, uncached[:, -1])
        if apart <= LIMIT * floor:
            return logits, new_cache
        found = (
            f"after {ids.shape[1]} positions cached logits differ from uncached ones by {apart:.2g} (RMS), where "
            f"rounding is about {floor:.1g}; `kvgen compare` shows why"
        )
        if self._on_wrong is None:
            raise CacheError(f"the KV cache is wrong: {found}")
        self._on_wrong(found)
        self._uncached_only = True
        return uncached, None

    def _floor(self, ids: Tensor, uncached: Tensor) -> float:
        """The noise floor of this very text: what a longer uncached pass over it changes in its logits, (B, vocab)."""
        floor = typical_floor(uncached, self.dtype)
        longest = self.context_length
        if ids.shape[0] > 1 or (longest is not None and ids.shape[1] >= longest):
            return floor
        longer = self._inner.logits_at(torch.cat((ids, ids[:, :1]), dim=1), [ids.shape[1] - 1])
        return floor if longer is None else max(floor, distance(longer[0], uncached[0]))

    def watch(self, progress: Callable[[int, int], None] | None) -> bool:
        return self._inner.watch(progress)

    def _is_due(self) -> bool:
        step, self._cached_steps = self._cached_steps, self._cached_steps + 1
        return step == 0 if self._every is None else step % self._every == 0
