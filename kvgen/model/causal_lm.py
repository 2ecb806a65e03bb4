"""Base class of a decoder: matches ids against the cache; subclasses compute the new positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvgen.errors import CacheError, UsageError
from kvgen.model.cache import KVCache, new_states
from kvgen.model.config import DecoderConfig
from kvgen.model.ids import check_form, check_range
from kvgen.model.recurrent import RECENT
from kvgen.model.spans import Span, ids_of
from kvgen.model.states import State

PREFILL_CHUNK = 512
"""Maximum prompt positions in one pass. Bounds its memory, and the time until it can be interrupted."""

_MIN_CHUNK, _MAX_PRODUCTS = 24, 1.2e11  # half a second on two CPU cores
_MAX_INITIAL_CAPACITY = 4096  # positions of a new cache
_MAX_LOGITS = 1 << 23  # computed at once


class CausalLM(ABC):
    """The contract `logits, cache = model(ids, cache)`, without the arithmetic.

    dtype, device: of the computation. kv_dtype: of cached keys and values; None for `dtype`.
    rotaries: `RotaryTables` for each of the config's rotaries.
    progress: called with the computed and the total number of new positions, for prompts that take several passes.
    """

    config: DecoderConfig
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")
    rotaries: Iterable[Any]
    kv_dtype: torch.dtype | None = None
    progress: Callable[[int, int], None] | None = None

    @abstractmethod
    def extend(self, spans: Sequence[Span]) -> Tensor:
        """Compute the new positions of all spans in one pass, and advance their caches.

        Ids are on the CPU, so that no check of them waits for a GPU. Returns hidden states, (rows, dim): span after
        span, in each by batch row and position.
        """

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, (rows, dim), before scale and softcap: (rows, vocab)."""

    @abstractmethod
    def token_rows(self, ids: Tensor) -> Tensor:
        """Return token embeddings of `ids`, (rows,), in a new tensor, (rows, dim)."""

    @abstractmethod
    def position_rows(self, positions: Tensor) -> Tensor:
        """Return learned position embeddings, (rows,) to (rows, dim). Called only if the config has them."""

    def new_states(self, batch: int, device: torch.device, dtype: torch.dtype | None = None) -> list[State]:
        """Create the states of an empty cache. dtype: of stored keys and values; None for that of the computation."""
        return new_states(self.config, batch, dtype or self.dtype, self.dtype, device)

    def forward(self, ids: Tensor, cache: KVCache | None = None, last: int = 1) -> tuple[Tensor, KVCache]:
        """Return logits for the token after `ids`, and the cache for the next call.

        ids: the WHOLE sequence, (B, n) int64; positions that the cache already holds are not computed again. On any
            device: the cache compares them on the CPU.
        last: number of positions at the end to return logits for.

        Returns fp32 (or fp64) logits, (B, last, vocab), and `cache` itself, updated, or a new one for None. If
        interrupted between two passes, the cache keeps the finished passes.

        Raises CacheError if a different model wrote the cache, UsageError for invalid ids.
        """
        (logits,), (cache,) = self.forward_batch([ids], [cache], [last])
        return logits.view(ids.shape[0], last, -1), cache

    @torch.inference_mode()
    def forward_batch(
        self, sequences: Sequence[Tensor], caches: Sequence[KVCache | None], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[KVCache]]:
        """`forward` for sequences of any lengths, (B, n), each with its own cache.

        counts: number of positions at the end of each sequence to return logits for, (B * count, vocab) each. Raises as
        `forward` does, before anything is computed.
        """
        wanted = zip(sequences, caches, counts, strict=True)
        spans = [self._new_span(ids, cache, count) for ids, cache, count in wanted]
        spans = [self._catch_up(span, count) for span, count in zip(spans, counts, strict=True)]
        rows: list[int] = []
        end = 0
        for span, count in zip(spans, counts, strict=True):
            for _ in range(span.new.shape[0]):
                end += span.new.shape[1]
                rows += range(end - count, end)
        hidden = self.extend(spans)
        logits = self._logits(hidden if len(rows) == end else hidden[rows])
        for span in spans:
            if self.progress and (total := span.cache.computed) > span.new.shape[1]:
                self.progress(total, total)
        sizes = [span.new.shape[0] * count for span, count in zip(spans, counts, strict=True)]
        return list(torch.split(logits, sizes)), [span.cache for span in spans]

    @torch.inference_mode()
    def cache_for(
        self, ids: Tensor, max_length: int, donors: Iterable[KVCache], ended: Sequence[KVCache] = ()
    ) -> KVCache:
        """Return a cache for a sequence, (1, n), seeded with the longest prefix that any donor holds.

        The prefix is copied; donors do not change. ended: donors that are no longer used; one is returned itself if
        more than half of it is reused. max_length: positions that the cache will hold.
        """
        variant = self._variant(ids.shape[1])
        known = [donor for donor in (*donors, *ended) if donor is not None]
        prompt = ids.cpu()
        same = [donor.shared(prompt, variant) for donor in known]
        shared, donor = 0, None
        for length, one in sorted(zip(same, known, strict=True), key=lambda pair: pair[0], reverse=True):
            if length <= shared:  # `reach` asks every layer, and a server has hundreds of donors
                break
            if (reached := one.reach(length)) > shared:
                shared, donor = reached, one
        capacity = min(max_length, _MAX_INITIAL_CAPACITY)
        if donor is not None and any(donor is one for one in ended) and 2 * shared > donor.length:
            donor.max_length = max_length
            return donor
        if donor is None or not shared:
            cache = KVCache(self, self.kv_dtype, capacity, max_length)
        else:
            cache = donor.branch(shared, capacity, max_length)
        cache.wanted |= {length for length in same if length > shared}
        return cache

    @torch.inference_mode()
    def append(self, new: Tensor, cache: KVCache | None, *, start: int) -> tuple[Tensor, KVCache]:
        """Add `new`, (B, T), to the cache at positions from `start`, without checking the text.

        This is the error of a cache that does not know its text; `compare` uses it to show the effect.
        """
        cache, new = self._checked(new, cache), new.cpu()
        cache.reused, cache.computed = cache.length, new.shape[1]
        span = self._span(new, cache, start, cache.length + new.shape[1])
        return self._logits(self._extend_one(span)[:, -1:]), cache

    def all_logits(self, ids: Tensor) -> Tensor:
        """Return uncached logits after every position of `ids`, (B, n) int64: (B, n, vocab). See `each_logits`."""
        check_form(ids)
        return torch.cat(list(self.each_logits(ids, range(ids.shape[1]))), dim=1)

    @torch.inference_mode()
    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor]:
        """Yield uncached logits after ascending `positions` of `ids`, (B, n), a few at a time: (B, m, vocab).

        They equal those of step-by-step decoding: if a text grows past LongRoPE's short length, the positions before
        are computed as part of a short text, in an extra run.
        """
        n, limit = ids.shape[1], max(1, _MAX_LOGITS // self.config.vocab_size // ids.shape[0])
        begin = 0
        for cut in sorted({rotary.short_length for rotary in self.config.rotaries if rotary.is_long(n)} | {n}):
            rest = self._span(ids[:, :cut].cpu(), self._checked(ids, None), start=0, total=cut)
            while rest.rows:
                chunk, rest = rest.split(self._chunk_size(rest))
                hidden, start = self._extend_one(chunk), chunk.start
                end = start + hidden.shape[1]
                wanted = [position - start for position in positions if max(begin, start) <= position < end]
                for at in range(0, len(wanted), limit):
                    yield self._logits(hidden[:, wanted[at : at + limit]])
            begin = cut

    def embed(self, spans: Sequence[Span], positions: Tensor) -> Tensor:
        """Return the input of the first block, (rows, dim). positions: as `positions_of` returns them.

        Every new id passes through this once. Raises UsageError for an id outside the vocabulary.
        """
        self.check(spans)
        return self.embed_rows(ids_of(spans, self.device), positions)

    def check(self, spans: Sequence[Span]) -> None:
        """Raise UsageError for an id outside the vocabulary, or a position without an embedding."""
        limit = self.config.learned_positions
        for span in spans:
            check_range(span.new, self.config.vocab_size)
            end = span.start + span.new.shape[1]
            if limit and end > limit:
                raise UsageError(f"the sequence has {end} positions, but the model has learned {limit}")

    def embed_rows(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the input of the first block for checked ids and their positions, (rows,) each: (rows, dim)."""
        x = self.token_rows(ids)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        return x + self.position_rows(positions) if self.config.learned_positions else x

    def rotations(self, spans: Sequence[Span], positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return cosines and sines of each row, per rotary of the config, (rows, R) each."""
        tables = []
        for rotary, make in zip(self.config.rotaries, self.rotaries, strict=True):
            long = [rotary.is_long(span.total) for span in spans for _ in range(span.rows)]
            tables.append(make(positions, torch.tensor(long, device=positions.device) if any(long) else None))
        return tables

    def _new_span(self, ids: Tensor, cache: KVCache | None, last: int) -> Span:
        """Match a whole sequence against its cache."""
        cache, ids, n = self._checked(ids, cache), ids.cpu(), ids.shape[1]
        new = cache.match(ids, self._variant(n), last)
        cache.expect(n)
        if new.shape[1] > RECENT:  # a prompt: its last position is computed again if it comes again, or after drafts
            cache.wanted.update(range(max(n - last, n - RECENT), n))
        return self._span(new, cache, cache.length, n)

    def _span(self, new: Tensor, cache: KVCache, start: int, total: int) -> Span:
        if not cache.states:
            cache.states = self.new_states(new.shape[0], self.device, cache.dtype)
        return Span(new, cache, start, total)

    def _chunk_size(self, span: Span) -> int:
        """How many positions of a span to compute in one pass; on a CPU fewer for large models and far into a text.

        Never by the clock: on torch the size of a pass may change the last bits of its logits.
        """
        size = PREFILL_CHUNK
        if self.device.type not in ("cuda", "mps"):
            products = self.config.products_at(span.start + size)
            size = min(size, max(_MIN_CHUNK, int(_MAX_PRODUCTS / products) // _MIN_CHUNK * _MIN_CHUNK))
        return max(1, size // span.new.shape[0])

    def _catch_up(self, span: Span, last: int) -> Span:
        """Compute a span except for one last pass of at least `last` positions, which is returned."""
        new = span.new.shape[1]
        while (left := span.new.shape[1]) > max(last, size := self._chunk_size(span)):
            if self.progress:
                self.progress(new - left, new)
            chunk, span = span.split(min(size, left - last))
            self.extend([chunk])
        if self.progress and left < new:
            self.progress(new - left, new)
        return span

    def _extend_one(self, span: Span) -> Tensor:
        """Return the hidden states of one span, (B, T, dim)."""
        return self.extend([span]).view(*span.new.shape, -1)

    def _checked(self, ids: Tensor, cache: KVCache | None) -> KVCache:
        check_form(ids)
        if cache is None:
            return KVCache(self, self.kv_dtype)
        if cache.owner is None and cache.length == 0:
            cache.owner = self
        if cache.owner is not self:
            raise CacheError("this KV cache was written by another model")
        return cache

    def _variant(self, length: int) -> int:
        """How many rotaries use their long frequencies for a sequence of this length."""
        return sum(rotary.is_long(length) for rotary in self.config.rotaries)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(..., dim) to (..., vocab)"""
        logits = self.head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
