"""The one contract that everything which decodes goes through: `logits, cache = model(ids, cache)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvgen.errors import UnsupportedError

_ROWS = 256  # of logits at a time: in float32 a large vocabulary takes a megabyte each


class Model(Protocol):
    """A cache-aware language model.

    ids: ALWAYS the whole sequence, (B, n) int64. Never a slice: the model decides what is new.
    cache: opaque to the caller. None to start, then whatever came back. None on every step is uncached decoding.

    Returns logits, (B, m, vocab) with m >= 1, whose last position is the prediction for the next token, and the
    cache for the next call. A cache may say in attributes `reused` and `computed` how many positions of the last
    call it already had and how many it did not.
    """

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]: ...


class Backend(ABC):
    """A model behind the contract, what is known of it, and the ways to call it wrongly that `compare` needs.

    name: of the kind of backend.
    device, dtype: where and in what precision it computes. dtype is not that of the logits it returns.
    vocab_size, context_length: None if unknown or unbounded.
    cannot_cache: why the model cannot use a cache at all; None if it can.
    lossy: why cached logits are expected to differ from uncached ones; None if they are not.
    rewinds: whether a cache may be handed any sequence, not only one that goes on from what it has seen.
    batches: whether `together` is one pass.
    module: the torch module inside, if there is one.
    engine: what does the arithmetic, for people.
    weight_bytes: what the weights take in memory. step_bytes: how much of them one step reads. None if unknown.
    changes_at: lengths of a text at which the model goes on otherwise: its windows, where a rotation changes;
        None if unknown.
    position_bytes: what one more position takes in the cache, while no window is full; None if unknown.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    vocab_size: int | None = None
    context_length: int | None = None
    cannot_cache: str | None = None
    lossy: str | None = None
    rewinds: bool = False
    batches: bool = False
    module: nn.Module | None = None
    engine: str = "torch"
    weight_bytes: int | None = None
    step_bytes: int | None = None
    position_bytes: int | None = None
    changes_at: tuple[int, ...] | None = None

    @abstractmethod
    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        """The contract."""

    def watch(self, progress: Callable[[int, int], None] | None) -> bool:
        """Have `progress` told of sequences that take several passes: new positions computed, of how many.

        First with 0, then before each further pass, last when all are. Returns whether this backend can tell.
        """
        return False

    def all_logits(self, ids: Tensor) -> Tensor | None:
        """Logits after every position of `ids` in one uncached pass, (B, n, vocab); None if it gives fewer."""
        logits, _ = self(ids, None)
        return logits if logits.shape[1] == ids.shape[1] else None

    def logits_at(self, ids: Tensor, positions: Sequence[int]) -> Tensor | None:
        """Logits after some positions of `ids`, (1, n), in one uncached pass: (len(positions), vocab).

        None if the model gives those of the last position alone.
        """
        logits, _ = self(ids, None)
        return logits[0, list(positions)] if logits.shape[1] == ids.shape[1] else None

    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor]:
        """Logits after some positions of `ids`, (1, n), in ascending order, a few at a time: (m, vocab).

        Those of an uncached pass, where it gives more than the last.
        """
        logits = self.all_logits(ids)
        if logits is not None:
            for start in range(0, len(positions), _ROWS):
                yield logits[0, list(positions[start : start + _ROWS])]
            return
        cache: Any = None
        for position in positions:
            logits, cache = self(ids[:, : position + 1], cache)
            yield logits[0, -1:]

    def most_drafts(self, length: int) -> int:
        """How many drafted tokens may stand behind a sequence of `length` for `speculate`; 0 if it is not offered."""
        return 0

    def speculate(self, ids: Tensor, cache: Any, count: int) -> tuple[Tensor, Any]:
        """The contract, with what is logits after each of the last `count` positions of `ids`: (B, count, vocab).

        They are those that the sequence gives position by position, so that drafts at its end can be judged; the next
        call drops those that were wrong.
        """
        raise UnsupportedError(f"the {self.name} backend cannot judge drafts")

    def together(
        self, sequences: Sequence[Tensor], caches: Sequence[Any], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Any]]:
        """The contract for sequences of any lengths, (1, n) each and with a cache of its own or None.

        Returns logits after the last positions of each, as many as `counts` says, (count, vocab) each, and the caches.
        They are those that each sequence gives alone.
        """
        logits, written = [], []
        for ids, cache, count in zip(sequences, caches, counts, strict=True):
            given, cache = self(ids, cache) if count == 1 else self.speculate(ids, cache, count)
            logits.append(given[0, -count:])
            written.append(cache)
        return logits, written

    def cache_for(self, ids: Tensor, most: int, donors: Sequence[Any], ended: Any = None) -> Any:
        """A cache to decode `ids` with, (1, n), which takes over what it can of another; None for a new one.

        most: positions that it will come to hold. donors: caches in use, which stay as they are. ended: one that is not
        in use any more, which may be returned itself; None for none.
        """
        return ended if self.rewinds else None

    def cache_bytes(self, positions: int) -> int:
        """What a cache takes that will come to hold so many positions; 0 if unknown."""
        return positions * (self.position_bytes or 0)

    def by_default(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """The whole sequence, handed in the way that someone does who has not read the manual."""
        return self(ids, cache)

    def trusting(self, new: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Only what is new, (B, T), handed in with the cache of what came before: the wrong pattern.

        Nothing is emulated: this is what the model does with such a call.
        """
        return self(new, cache)

    def placed(self, ids: Tensor, cache: Any, positions: Tensor) -> tuple[Tensor, Any]:
        """The contract, but with `positions`, (n,) int64, for the whole sequence instead of 0 to n - 1.

        What is cached already may keep the positions that it was computed with.
        Raises UnsupportedError where positions cannot be chosen.
        """
        raise UnsupportedError(f"the {self.name} backend does not let positions be chosen")

    def in_wider(self, dtype: torch.dtype) -> Backend | None:
        """The same model computing in a wider dtype; None where it cannot. It shares what weights it can."""
        return None
