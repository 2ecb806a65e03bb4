"""The subject of a comparison: the contract, plus calls that only a comparison makes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvgen.comparison.rounding import eps
from kvgen.contract import Backend
from kvgen.errors import UnsupportedError, in_one_line
from kvgen.generation.counts import total

_ROUNDINGS = 4  # rounding errors of what a part returns, such as sums of products


class Subject:
    """Wrap any backend; subclasses add what one kind of backend offers.

    cannot_cache: why the model cannot use a cache; None if it can.
    lossy: why cached logits differ from uncached ones by design; None if they should be equal.
    changes_at: sequence lengths where the model starts to compute differently, such as its windows; None if unknown.
    chunk_sizes: numbers of positions that the model computes at once of a long text.
    module: the torch module, if there is one.
    reused: positions that all calls so far found in their caches; None if the caches do not tell.
    """

    cannot_cache: str | None = None
    lossy: str | None = None
    changes_at: tuple[int, ...] | None = None
    chunk_sizes: tuple[int, ...] = ()
    module: nn.Module | None = None

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.reused: int | None = 0

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        """The contract."""
        logits, written = self.backend(ids, cache)
        self._count(written)
        return logits, written

    def uncached(self, ids: Tensor) -> Tensor:
        """Logits, (B, m, vocab) with m >= 1, of a call that neither reads nor writes a cache where the model can."""
        return self(ids, None)[0]

    def forward_batch(
        self, sequences: Sequence[Tensor], caches: Sequence[Any], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Any]]:
        """See `Backend.forward_batch`."""
        logits, written = self.backend.forward_batch(sequences, caches, counts)
        for cache in written:
            self._count(cache)
        return logits, written

    def _count(self, cache: Any) -> None:
        self.reused = total((self.reused, getattr(cache, "reused", None)))

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
        """Uncached logits at `positions` of `ids`, (1, n), in any order, from one pass: (len(positions), vocab).

        None if the model returns only the logits of the last position.
        """
        ascending = sorted(set(positions))
        found = self.backend.each_logits(ids, ascending)
        return None if found is None else torch.cat(list(found))[[ascending.index(position) for position in positions]]

    def rounded_otherwise(self, ids: Tensor) -> Tensor | None:
        """Uncached logits after `ids`, (1, n), that another implementation rounds differently: (vocab,).

        None if the model has one only.
        """
        return None

    def shaken(self, ids: Tensor, seed: int) -> Tensor | None:
        """Uncached logits after `ids`, (1, n), if each part of the module rounds its results at random: (vocab,).

        None without a module. This is Monte Carlo arithmetic (Parker, 1997): what it changes, roundings can change.
        """
        if self.module is None:
            return None
        generator = torch.Generator().manual_seed(seed)

        def shake(part: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            noise = (2 * torch.rand(output.shape, generator=generator) - 1) * _ROUNDINGS * eps(output.dtype)
            return output * (1 + noise.to(output))

        hooks = [part.register_forward_hook(shake) for part in self.module.modules() if not any(part.children())]
        try:
            return self.uncached(ids)[0, -1]
        finally:
            for hook in hooks:
                hook.remove()

    def library_default(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Pass the whole sequence with the library's default arguments."""
        return self(ids, cache)

    def append_unchecked(self, new: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Pass only the new ids, (B, T), with the cache of earlier ones: the wrong pattern.

        Nothing is emulated: this is what the model does with such a call.
        """
        return self(new, cache)

    def with_positions(self, ids: Tensor, cache: Any, positions: Tensor) -> tuple[Tensor, Any]:
        """The contract with explicit `positions`, (n,) int64, in place of 0 to n - 1.

        Cached entries may keep the positions that they were computed with. Raises UnsupportedError if the model does
        not accept positions.
        """
        raise UnsupportedError(f"the {self.backend.name} backend does not accept positions")

    def stored(self, cache: Any) -> Any:
        """Save a cache and load it: a new cache that shares nothing with the old one.

        By default a deep copy. Raises UnsupportedError if the cache cannot be copied.
        """
        shared = {} if self.module is None else {id(self.module): self.module}
        try:
            return copy.deepcopy(cache, shared)
        except (TypeError, RuntimeError) as error:
            raise UnsupportedError(f"its cache cannot be copied ({in_one_line(error)})") from error

    def left_padded(self, texts: Sequence[Tensor], cache: Any = None) -> tuple[Tensor, Any]:
        """Pass texts of different lengths, (1, n) each, as rows of one batch, padded on the left and masked there.

        cache: of the call before, for the same rows, all shorter by the same number of tokens. Returns logits whose
        last position predicts the next token of each row, (B, m, vocab), and the cache. Raises UnsupportedError if the
        model takes no mask.
        """
        raise UnsupportedError("the model takes no mask for padding")

    def in_dtype(self, dtype: torch.dtype) -> Subject | None:
        """The same model in a wider dtype, sharing weights where possible; None if unsupported."""
        return None
