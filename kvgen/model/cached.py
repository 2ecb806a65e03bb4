"""A model over the KV cache: one forward pass behind the contract `logits, cache = model(ids, cache)`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from kvgen.errors import CacheError, UsageError
from kvgen.model.cache import KVCache
from kvgen.model.config import DecoderConfig


@dataclass(frozen=True)
class Span:
    """What a pass computes behind one cache: `new`, (B, T) ids, at positions from `start`."""

    new: Tensor
    cache: KVCache
    start: int

    @property
    def rows(self) -> int:
        """How many rows it takes in a pass."""
        return self.new.numel()


def positions_of(spans: Sequence[Span]) -> Tensor:
    """The position of each row, (rows,) int64."""
    runs = (range(span.start, span.start + span.new.shape[1]) for span in spans for _ in range(span.new.shape[0]))
    return torch.tensor(list(chain.from_iterable(runs)), device=spans[0].new.device)


def check_form(ids: Tensor) -> None:
    """Raises UsageError for what is no (B, n) int64 tensor of at least one token."""
    if not isinstance(ids, Tensor):
        raise UsageError(f"token ids must be an int64 tensor, (batch, n), not {type(ids).__name__}")
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise UsageError(
            f"token ids must be an int64 tensor, (batch, n), not {str(ids.dtype)[6:]} of shape {tuple(ids.shape)}"
        )
    if ids.numel() == 0:
        raise UsageError("cannot decode an empty sequence: give at least one token")


def check_range(ids: Tensor, vocabulary: int) -> None:
    """Raises UsageError for an id outside the vocabulary."""
    least, most = (int(end) for end in ids.aminmax())
    if least < 0 or most >= vocabulary:
        outside = least if least < 0 else most
        raise UsageError(f"token id {outside} is outside the model's vocabulary of {vocabulary}")


class CachedModel(ABC):
    """What makes a forward pass the contract: the cache, and what of a sequence is new. How to compute is left open."""

    config: DecoderConfig
    rotaries: Iterable[Any]
    """`RotaryTables` of each of the config's rotaries."""
    kv_dtype: torch.dtype | None = None
    """Of cached keys and values; None for that of the computation."""

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

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KVCache | None = None, last: int = 1) -> tuple[Tensor, KVCache]:
        """Logits for the token after `ids`, and the cache to hand in with the next, longer sequence.

        ids: the WHOLE sequence, (B, n) int64. What is new is decided here: positions whose ids the cache has
        already seen are not computed again. last: of how many positions the logits are wanted. Returns fp32 (or fp64)
        logits, (B, last, vocab), and the cache, which is `cache` itself, brought up to date, or a new one for None.

        Raises CacheError for a cache that another model wrote, UsageError for ids that are none.
        """
        span = self._span(ids, cache, last)
        return self._logits(self._extend_one(span)[:, -last:]), span.cache

    @torch.inference_mode()
    def forward_together(
        self, sequences: Sequence[Tensor], caches: Sequence[KVCache | None], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[KVCache]]:
        """`forward` for sequences of any lengths, (1, n) each and with a cache of its own, in one pass.

        counts: of how many positions at the end of each the logits are wanted. Returns them, (count, vocab) each, and
        the caches. Raises as `forward` does, before anything is computed.
        """
        wanted = zip(sequences, caches, counts, strict=True)
        spans = [self._span(ids, cache, count) for ids, cache, count in wanted]
        ends = accumulate(span.rows for span in spans)
        rows = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        logits = self._logits(self.extend(spans)[rows])
        return list(torch.split(logits, list(counts))), [span.cache for span in spans]

    @torch.inference_mode()
    def cache_for(self, ids: Tensor, capacity: int, donors: Iterable[KVCache]) -> KVCache:
        """A new cache for a sequence, (1, n), that takes over as much of it as one of the donors has.

        It has room for `capacity` positions.
        """
        variant = self._variant(ids.shape[1])
        counts = [(donor.shared(ids, variant), donor) for donor in donors]
        shared, donor = max(counts, key=lambda pair: pair[0], default=(0, None))
        return donor.branch(shared, capacity) if donor and shared else KVCache(self, self.kv_dtype, capacity)

    @torch.inference_mode()
    def append(self, new: Tensor, cache: KVCache | None, *, start: int) -> tuple[Tensor, KVCache]:
        """The forward pass without the guard: add `new`, (B, T), to the cache at positions from `start`, unasked.

        This is what a cache does that does not know its text. `compare` shows with it what goes wrong then.
        """
        cache = self._checked(new, cache)
        cache.reused, cache.computed = cache.length, new.shape[1]
        return self._logits(self._extend_one(Span(new, cache, start))[:, -1:]), cache

    @torch.inference_mode()
    def all_logits(self, ids: Tensor, positions: Sequence[int] | None = None) -> Tensor:
        """Logits after every position of `ids`, (B, n) int64, in one parallel pass: (B, n, vocab).

        positions: only after these; (B, len(positions), vocab).

        They are those of step-by-step decoding. So a text that grows out of LongRoPE's short length is passed over
        twice, for the positions that a short text rotates otherwise than a long one does.
        """
        check_form(ids)
        n = ids.shape[1]
        cuts = sorted({rotary.short_length for rotary in self.config.rotaries if rotary.is_long(n)} | {n})
        passes = [self._extend_one(Span(ids[:, :cut], self._checked(ids, None), start=0)) for cut in cuts]
        parts = [hidden[:, start:] for start, hidden in zip([0, *cuts], passes, strict=False)]
        hidden = torch.cat(parts, dim=1)
        return self._logits(hidden if positions is None else hidden[:, list(positions)])

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
            long = [rotary.is_long(span.cache.length + span.new.shape[1]) for span in spans]
            if not any(long):
                tables.append(make(positions))
                continue
            of_rows = torch.tensor(long).repeat_interleave(torch.tensor([span.rows for span in spans]))
            tables.append(make(positions, of_rows.to(positions.device)))
        return tables

    def _span(self, ids: Tensor, cache: KVCache | None, last: int = 1) -> Span:
        """What is new of a whole sequence."""
        cache = self._checked(ids, cache)
        return Span(cache.match(ids, self._variant(ids.shape[1]), last), cache, cache.length)

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
