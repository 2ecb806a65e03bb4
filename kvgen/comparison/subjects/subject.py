"""A model under comparison: the contract, and the calls beside it that only a comparison makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvgen.contract import Backend, ForwardBatch
from kvgen.errors import UnsupportedError


class Subject:
    """Wraps a backend. This class serves every backend; a subclass knows more of one kind.

    cannot_cache: why the model cannot use a cache at all; None if it can.
    lossy: why cached logits are expected to differ from uncached ones; None if they are not.
    changes_at: sequence lengths at which the model starts to compute differently, such as its windows; None if unknown.
    module: the torch module inside, if there is one.
    """

    cannot_cache: str | None = None
    lossy: str | None = None
    changes_at: tuple[int, ...] | None = None
    module: nn.Module | None = None

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        """The contract."""
        return self.backend(ids, cache)

    @property
    def forward_batch(self) -> ForwardBatch:
        return self.backend.forward_batch

    @property
    def dtype(self) -> torch.dtype:
        return self.backend.dtype

    @property
    def rewinds(self) -> bool:
        return self.backend.rewinds

    @property
    def context_length(self) -> int | None:
        return self.backend.context_length

    def logits_at(self, ids: Tensor, positions: Sequence[int]) -> Tensor | None:
        """Uncached logits after some positions of `ids`, (1, n), in any order, in one pass: (len(positions), vocab).

        None if the model gives the logits of the last position alone.
        """
        ascending = sorted(set(positions))
        found = self.backend.each_logits(ids, ascending)
        return None if found is None else torch.cat(list(found))[[ascending.index(position) for position in positions]]

    def by_default(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Hand over the whole sequence in the way of someone who has not read the library's manual."""
        return self(ids, cache)

    def trusting(self, new: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Hand over only what is new, (B, T), with the cache of what came before: the wrong pattern.

        Nothing is emulated: this is what the model does with such a call.
        """
        return self(new, cache)

    def placed(self, ids: Tensor, cache: Any, positions: Tensor) -> tuple[Tensor, Any]:
        """The contract, but with `positions`, (n,) int64, for the whole sequence instead of 0 to n - 1.

        What is cached may keep the positions that it was computed with. Raises UnsupportedError where positions cannot
        be chosen.
        """
        raise UnsupportedError(f"the {self.backend.name} backend does not let positions be chosen")

    def in_wider(self, dtype: torch.dtype) -> Subject | None:
        """The same model computing in a wider dtype; None where it cannot. It shares what weights it can."""
        return None
