"""The contract that all decoding goes through: `logits, cache = model(ids, cache)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kvgen.errors import UnsupportedError, UsageError

_LOGIT_ROWS = 256  # per slice: with a large vocabulary a row takes a megabyte


class Model(Protocol):
    """A language model with a cache.

        >>> ids = torch.tensor([loaded.tokenizer.encode("The capital of France is")])
        >>> logits, cache = loaded.model(ids, None)
        >>> ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        >>> logits, cache = loaded.model(ids, cache)
        >>> cache.reused, cache.computed
        (5, 1)

    ids: ALWAYS the whole sequence, (B, n) int64, never a slice. The model decides what is new.
    cache: opaque to the caller: None to start, then the last returned one. None on every step is uncached decoding.

    Returns logits, (B, m, vocab) with m >= 1, whose last position predicts the next token, and the cache for the next
    call. A cache may have attributes `reused` and `computed`: the numbers of positions that the last call found in the
    cache and computed.
    """

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]: ...


ForwardBatch = Callable[[Sequence[Tensor], Sequence[Any], Sequence[int]], tuple[list[Tensor], list[Any]]]
"""See `Backend.forward_batch`."""


def one_by_one(model: Model) -> ForwardBatch:
    """Return a `Backend.forward_batch` that calls the model for one sequence after another, without drafts."""

    def forward(
        sequences: Sequence[Tensor], caches: Sequence[Any], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Any]]:
        if any(count > 1 for count in counts):
            raise UnsupportedError("this model returns logits of the last position only, so it cannot verify drafts")
        results = [model(ids, cache) for ids, cache in zip(sequences, caches, strict=True)]
        return [logits[0, -1:] for logits, _ in results], [cache for _, cache in results]

    return forward


class Backend(ABC):
    """A model behind the contract, with facts about it. Subclasses must set `name`, `device`, `dtype`, `__call__`.

        >>> model = loaded.model
        >>> model.name, model.vocab_size, model.context_length, model.rewinds, model.batches
        ('native', 49152, 8192, True, True)

    name: the kind of backend. device, dtype: of the computation; logits may have a different dtype.
    vocab_size, context_length: None if unknown or unbounded.
    rewinds: a cache accepts any sequence, not only a continuation of its own.
    batches: `forward_batch` is one pass.
    engine: what computes, to show to users.
    weight_bytes: memory of the weights. step_bytes: the part that one step reads. position_bytes: memory of one more
        cached position while no window is full. None if unknown.
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
        """See `Model`."""

    def forward_batch(
        self, sequences: Sequence[Tensor], caches: Sequence[Any], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Any]]:
        """Call the contract for sequences of any lengths, (1, n) each, with a cache or None for each.

        Returns the logits after the last `count` positions of each, (count, vocab), and the caches. Each sequence gets
        the logits that it would get alone, so drafts at its end can be verified; the next call drops rejected ones.
        """
        return one_by_one(self)(sequences, caches, counts)

    def max_drafts(self, length: int) -> int:
        """Return the maximum number of draft tokens after a sequence of `length`; 0 if drafts cannot be verified."""
        return 0

    def cache_for(self, ids: Tensor, max_length: int, donors: Sequence[Any], ended: Sequence[Any] = ()) -> Any:
        """Return a cache for `ids`, (1, n), with the longest prefix that a donor holds; None to start a new one.

        max_length: positions that the cache will hold. donors: caches in use; they do not change. ended: caches that
        are no longer used; one of them may be returned.
        """
        return ended[-1] if self.rewinds and ended else None

    def expect_branch(self, cache: Any, length: int) -> None:  # noqa: B027 (most have nothing to prepare)
        """Prepare to copy the first `length` positions of a cache, which the next pass will compute."""

    def cache_bytes(self, positions: int) -> int:
        """Return the memory of a cache of up to `positions`; 0 if unknown."""
        return positions * (self.position_bytes or 0)

    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor] | None:
        """Yield uncached logits after ascending `positions` of `ids`, (1, n), a few at a time, (m, vocab) each.

        Returns None if the model returns logits of the last position only.
        """
        logits, _ = self(ids, None)
        if logits.shape[1] != ids.shape[1]:
            return None
        starts = range(0, len(positions), _LOGIT_ROWS)
        return (logits[0, list(positions[start : start + _LOGIT_ROWS])] for start in starts)

    @property
    def ids_device(self) -> torch.device:
        """Where ids are best kept."""
        return self.device

    def watch(self, progress: Callable[[int, int], None] | None) -> bool:
        """Call `progress(done, total)` during passes over long sequences: with 0, before each further pass, at the end.

        Returns whether this backend supports it.
        """
        return False

    def ids_tensor(self, ids: Sequence[int]) -> Tensor:
        """Return `ids` as a (1, n) int64 tensor on `ids_device`. Raises UsageError for ids outside the vocabulary."""
        vocabulary = self.vocab_size
        outside = next((id_ for id_ in ids if id_ < 0 or (vocabulary is not None and id_ >= vocabulary)), None)
        if outside is not None:
            raise UsageError(f"token id {outside} is outside the model's vocabulary of {vocabulary}")
        return torch.tensor([list(ids)], dtype=torch.int64, device=self.ids_device)
