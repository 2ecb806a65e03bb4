"""A model over the KV cache: one forward pass behind the contract `logits, cache = model(ids, cache)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from kvgen.errors import CacheError, UsageError
from kvgen.model.cache import KVCache
from kvgen.model.config import DecoderConfig, Rotary
from kvgen.model.ids import check_form, check_range
from kvgen.model.states import State, new_state

MOST_NEW = 512
"""The most new positions of prompts in one pass, which bounds its memory, and how long it cannot be interrupted."""

_LEAST_NEW, _MOST_PRODUCTS = 24, 1.2e11  # on two cores of a CPU half a second
_MOST_RESERVED = 4096  # positions that a cache has room for from the start
_MOST_LOGITS = 1 << 23  # that are computed at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Span:
    """What a pass computes behind one cache: `new`, (B, T) ids, at positions from `start`.

    total: the length of the sequence that they are of, which may go on behind them.
    """

    new: Tensor
    cache: KVCache
    start: int
    total: int

    @property
    def rows(self) -> int:
        """How many rows it takes in a pass."""
        return self.new.numel()

    def split(self, count: int) -> tuple[Span, Span]:
        """Its first `count` positions, and the others."""
        first = Span(self.new[:, :count], self.cache, self.start, self.total)
        return first, Span(self.new[:, count:], self.cache, self.start + count, self.total)


@dataclass(frozen=True)
class Pass:
    """What the layers of a pass are handed beside hidden states.

    rotations: cosines and sines of the new positions for each of the config's rotaries, (rows, 1, R) each.
    shared: what one layer has computed for others of its kind.
    """

    spans: Sequence[Span]
    rotations: Mapping[Rotary, tuple[Tensor, Tensor]]
    shared: dict[Any, Any] = field(default_factory=dict)


def positions_of(spans: Sequence[Span]) -> Tensor:
    """The position of each row, (rows,) int64."""
    runs = (range(span.start, span.start + span.new.shape[1]) for span in spans for _ in range(span.new.shape[0]))
    return torch.tensor(list(chain.from_iterable(runs)), device=spans[0].new.device)


class CausalLM(ABC):
    """What makes a forward pass the contract: the cache, and what of a sequence is new. How to compute is left open."""

    config: DecoderConfig
    dtype: torch.dtype
    """Of the computation."""
    rotaries: Iterable[Any]
    """`RotaryTables` of each of the config's rotaries."""
    kv_dtype: torch.dtype | None = None
    """Of cached keys and values; None for that of the computation."""
    progress: Progress | None = None
    """Told of sequences that take several passes: how many of their new positions are computed, of how many."""

    @abstractmethod
    def extend(self, spans: Sequence[Span]) -> Tensor:
        """Compute spans side by side, each behind what its cache holds, and count them there.

        Returns hidden states, (rows, dim): those of the spans one after the other, of each by batch row and position.
        """

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (rows, dim), before scale and cap: (rows, vocab)."""

    @abstractmethod
    def token_rows(self, ids: Tensor) -> Tensor:
        """The embeddings of `ids`, (rows,): (rows, dim), a tensor of its own."""

    @abstractmethod
    def position_rows(self, positions: Tensor) -> Tensor:
        """The learned embeddings of positions, (rows,): (rows, dim). Asked for only if the config has them."""

    def new_states(self, batch: int, device: torch.device, dtype: torch.dtype | None = None) -> list[State]:
        """The states of an empty cache. dtype: to store keys and values in; None for that of the computation."""
        return [new_state(layer.mixer, batch, dtype or self.dtype, device) for layer in self.config.layers]

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KVCache | None = None, last: int = 1) -> tuple[Tensor, KVCache]:
        """Logits for the token after `ids`, and the cache to hand in with the next, longer sequence.

        ids: the WHOLE sequence, (B, n) int64. What is new is decided here: positions whose ids the cache has
        already seen are not computed again. last: of how many positions the logits are wanted. Returns fp32 (or fp64)
        logits, (B, last, vocab), and the cache, which is `cache` itself, brought up to date, or a new one for None.
        What is interrupted between two passes stays in the cache as far as it came.

        Raises CacheError for a cache that another model wrote, UsageError for ids that are none.
        """
        span = self._caught_up(self._new_span(ids, cache, last), last)
        hidden = self._extend_one(span)
        self._tell_done(span)
        return self._logits(hidden[:, -last:]), span.cache

    @torch.inference_mode()
    def forward_batch(
        self, sequences: Sequence[Tensor], caches: Sequence[KVCache | None], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[KVCache]]:
        """`forward` for sequences of any lengths, (1, n) each and with a cache of its own, side by side.

        counts: of how many positions at the end of each the logits are wanted. Returns them, (count, vocab) each, and
        the caches. Raises as `forward` does, before anything is computed.
        """
        wanted = zip(sequences, caches, counts, strict=True)
        spans = [self._new_span(ids, cache, count) for ids, cache, count in wanted]
        spans = [self._caught_up(span, count) for span, count in zip(spans, counts, strict=True)]
        ends = accumulate(span.rows for span in spans)
        rows = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        logits = self._logits(self.extend(spans)[rows])
        for span in spans:
            self._tell_done(span)
        return list(torch.split(logits, list(counts))), [span.cache for span in spans]

    @torch.inference_mode()
    def cache_for(self, ids: Tensor, most: int, donors: Iterable[KVCache], ended: KVCache | None = None) -> KVCache:
        """A cache for a sequence, (1, n), that has as much of it as one of the donors, and will come to hold `most`.

        Donors stay as they are: what they have is copied. `ended` is one that nobody uses any more: it is returned
        itself where that keeps more than half of it.
        """
        variant = self._variant(ids.shape[1])
        usable = [*donors, *([] if ended is None else [ended])]
        counts = [(donor.shared(ids, variant), donor) for donor in usable]
        shared, donor = max(counts, key=lambda pair: pair[0], default=(0, None))
        capacity = min(most, _MOST_RESERVED)
        if donor is None or not shared:
            return KVCache(self, self.kv_dtype, capacity, most)
        if donor is ended and 2 * shared > donor.length:
            donor.most = most
            return donor
        return donor.branch(shared, capacity, most)

    @torch.inference_mode()
    def append(self, new: Tensor, cache: KVCache | None, *, start: int) -> tuple[Tensor, KVCache]:
        """The forward pass without the guard: add `new`, (B, T), to the cache at positions from `start`, unasked.

        This is what a cache does that does not know its text. `compare` shows with it what goes wrong then.
        """
        cache = self._checked(new, cache)
        cache.reused, cache.computed = cache.length, new.shape[1]
        span = self._span(new, cache, start, cache.length + new.shape[1])
        return self._logits(self._extend_one(span)[:, -1:]), cache

    def all_logits(self, ids: Tensor) -> Tensor:
        """Logits after every position of `ids`, (B, n) int64, computed anew: (B, n, vocab). See `each_logits`."""
        check_form(ids)
        whole, end = torch.empty(0), 0
        for logits in self.each_logits(ids, range(ids.shape[1])):
            if end == 0:
                whole = logits.new_empty(*ids.shape, logits.shape[-1])
            whole[:, end : end + logits.shape[1]] = logits
            end += logits.shape[1]
        return whole

    @torch.inference_mode()
    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor]:
        """Logits after some positions of `ids`, (B, n), in ascending order, a few at a time: (B, m, vocab).

        They are those of step-by-step decoding. So a text that grows out of LongRoPE's short length is passed over
        twice, for the positions that a short text rotates otherwise than a long one does.
        """
        n, most = ids.shape[1], max(1, _MOST_LOGITS // self.config.vocab_size // ids.shape[0])
        begin = 0
        for cut in sorted({rotary.short_length for rotary in self.config.rotaries if rotary.is_long(n)} | {n}):
            for hidden, start in self._passes(self._span(ids[:, :cut], self._checked(ids, None), start=0, total=cut)):
                end = start + hidden.shape[1]
                wanted = [position - start for position in positions if max(begin, start) <= position < end]
                for at in range(0, len(wanted), most):
                    yield self._logits(hidden[:, wanted[at : at + most]])
            begin = cut

    def embed(self, spans: Sequence[Span], positions: Tensor) -> Tensor:
        """What the first block reads, (rows, dim). positions: as `positions_of` gives them.

        Every id passes here before it is computed, and only once. Raises UsageError for one outside the vocabulary.
        """
        ids = torch.cat([span.new.flatten() for span in spans])
        check_range(ids, self.config.vocab_size)
        x = self.token_rows(ids)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.config.learned_positions:
            end = int(positions.max()) + 1
            if end > self.config.learned_positions:
                raise UsageError(
                    f"the sequence has {end} positions, but the model has learned {self.config.learned_positions}"
                )
            x = x + self.position_rows(positions)
        return x

    def rotations(self, spans: Sequence[Span], positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of each row for each of the config's rotaries, (rows, R) each."""
        tables = []
        for rotary, make in zip(self.config.rotaries, self.rotaries, strict=True):
            long = [rotary.is_long(span.total) for span in spans]
            if not any(long):
                tables.append(make(positions))
                continue
            of_rows = torch.tensor(long).repeat_interleave(torch.tensor([span.rows for span in spans]))
            tables.append(make(positions, of_rows.to(positions.device)))
        return tables

    def _new_span(self, ids: Tensor, cache: KVCache | None, last: int = 1) -> Span:
        """What is new of a whole sequence."""
        cache, n = self._checked(ids, cache), ids.shape[1]
        new = cache.match(ids, self._variant(n), last)
        cache.expect(n)
        return self._span(new, cache, cache.length, n)

    def _span(self, new: Tensor, cache: KVCache, start: int, total: int) -> Span:
        """A span whose cache has a state for each layer."""
        if not cache.states:
            cache.states = self.new_states(new.shape[0], new.device, cache.dtype)
        return Span(new, cache, start, total)

    def _most_new(self, span: Span) -> int:
        """How many positions of a span to compute in one pass: on a CPU, fewer of a large model."""
        most = MOST_NEW
        if span.new.device.type == "cpu":
            most = min(most, max(_LEAST_NEW, int(_MOST_PRODUCTS / self.config.products)))
        return max(1, most // span.new.shape[0])

    def _passes(self, span: Span) -> Iterator[tuple[Tensor, int]]:
        """Hidden states of a span pass by pass, (B, m, dim), and the position of the first of them."""
        while span.rows:
            head, span = span.split(self._most_new(span))
            yield self._extend_one(head), head.start

    def _caught_up(self, span: Span, last: int) -> Span:
        """Compute all of a span but what one pass can do, at least its `last` positions; returns the rest."""
        new, most = span.new.shape[1], max(last, self._most_new(span))
        while True:
            left = span.new.shape[1]
            if self.progress and new > most:
                self.progress(new - left, new)
            if left <= most:
                return span
            head, span = span.split(self._most_new(span))
            self.extend([head])

    def _tell_done(self, rest: Span) -> None:
        """Say that a sequence is computed whole, where `_caught_up` has left the rest of it."""
        new = rest.cache.computed
        if self.progress and new > rest.new.shape[1]:
            self.progress(new, new)

    def _extend_one(self, span: Span) -> Tensor:
        """Hidden states of one span, (B, T, dim)."""
        return self.extend([span]).view(*span.new.shape, -1)

    def _checked(self, ids: Tensor, cache: KVCache | None) -> KVCache:
        check_form(ids)
        if cache is not None and cache.owner is None and cache.length == 0:
            cache.owner = self
        if cache is not None and cache.owner is not self:
            raise CacheError("this KV cache was written by another model")
        return KVCache(self, self.kv_dtype) if cache is None else cache

    def _variant(self, length: int) -> int:
        """How many rotations a sequence of this length takes the long frequencies of."""
        return sum(rotary.is_long(length) for rotary in self.config.rotaries)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states, (..., dim): (..., vocab)."""
        logits = self.head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
