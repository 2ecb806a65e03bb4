"""The one contract that everything which decodes goes through: `logits, cache = model(ids, cache)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kvgen.errors import UnsupportedError, UsageError

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


ForwardBatch = Callable[[Sequence[Tensor], Sequence[Any], Sequence[int]], tuple[list[Tensor], list[Any]]]
"""As `Backend.forward_batch`."""


def one_by_one(model: Model) -> ForwardBatch:
    """`Backend.forward_batch` of a model that computes one sequence at a time and judges no drafts."""

    def forward(
        sequences: Sequence[Tensor], caches: Sequence[Any], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Any]]:
        if any(count > 1 for count in counts):
            raise UnsupportedError("this model gives the logits of the last position alone: it cannot judge drafts")
        results = [model(ids, cache) for ids, cache in zip(sequences, caches, strict=True)]
        return [logits[0, -1:] for logits, _ in results], [cache for _, cache in results]

    return forward


class Backend(ABC):
    """A model behind the contract, and what is known of it. Only the first line and `__call__` have to be given.

    name: of the kind of backend. device, dtype: where and in what precision it computes, which is not always the
        dtype of its logits.
    vocab_size, context_length: None if unknown or unbounded.
    rewinds: whether a cache may be handed any sequence, not only one that continues what it has seen.
    batches: whether `forward_batch` is one pass.
    engine: what does the arithmetic, for people.
    weight_bytes: memory of the weights. step_bytes: how much of them one step reads. position_bytes: memory of one
        more cached position, while no window is full. None if unknown.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    vocab_size: int | None = None
    context_length: int | None = None
    rewinds: bool = False
    batches: bool = False
    engine: str = "torch"
    weight_bytes: int | None = None
    step_bytes: int | None = None
    position_bytes: int | None = None

    @abstractmethod
    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        """The contract."""

    def forward_batch(
        self, sequences: Sequence[Tensor], caches: Sequence[Any], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Any]]:
        """The contract for sequences of any lengths, (1, n) each, each with its own cache or None.

        Returns the logits after the last positions of each, as many as `counts` says, (count, vocab) each, and the
        caches. They are the logits that each sequence gives alone, position by position, so that drafts at the end can
        be judged. The next call drops drafts that were wrong.
        """
        return one_by_one(self)(sequences, caches, counts)

    def most_drafts(self, length: int) -> int:
        """How many drafted tokens may stand behind a sequence of `length`; 0 if `counts` must be 1."""
        return 0

    def cache_for(self, ids: Tensor, most: int, donors: Sequence[Any], ended: Any = None) -> Any:
        """A cache to decode `ids` with, (1, n), seeded with the longest prefix that a donor holds; None for a new one.

        most: positions that it will come to hold. donors: caches in use, which stay as they are. ended: a cache that
        nothing uses any more, which may be returned itself; None for none.
        """
        return ended if self.rewinds else None

    def cache_bytes(self, positions: int) -> int:
        """Memory of a cache that will come to hold so many positions; 0 if unknown."""
        return positions * (self.position_bytes or 0)

    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor] | None:
        """Uncached logits after some positions of `ids`, (1, n), in ascending order, a few at a time: (m, vocab) each.

        None if the model gives the logits of the last position alone.
        """
        logits, _ = self(ids, None)
        if logits.shape[1] != ids.shape[1]:
            return None
        return (logits[0, list(positions[start : start + _ROWS])] for start in range(0, len(positions), _ROWS))

    def watch(self, progress: Callable[[int, int], None] | None) -> bool:
        """Report passes over long sequences to `progress`: new positions computed, of how many.

        First with 0, then before each further pass, last when all are computed. Returns whether this backend can.
        """
        return False

    def ids_tensor(self, ids: Sequence[int]) -> Tensor:
        """`ids` as the model takes them: (1, n) int64 on its device. Raises UsageError for one it does not know."""
        vocabulary = self.vocab_size
        outside = next((id_ for id_ in ids if id_ < 0 or (vocabulary is not None and id_ >= vocabulary)), None)
        if outside is not None:
            raise UsageError(f"token id {outside} is outside the model's vocabulary of {vocabulary}")
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
