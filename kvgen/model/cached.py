"""A model over the KV cache: one forward pass behind the contract `logits, cache = model(ids, cache)`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvgen.errors import CacheError, UsageError
from kvgen.model.cache import KVCache
from kvgen.model.config import DecoderConfig


class CachedModel(ABC):
    """What makes a forward pass the contract: the cache, and what of a sequence is new. How to compute is left open."""

    config: DecoderConfig
    kv_dtype: torch.dtype | None = None
    """Of cached keys and values; None for that of the computation."""

    @abstractmethod
    def extend(self, new: Tensor, cache: KVCache, start: int) -> Tensor:
        """Compute `new`, (B, T), at positions from `start`, behind what is cached, and count them in the cache.

        Returns hidden states, (B, T, dim).
        """

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (B, T, dim), before scale and cap: (B, T, vocab)."""

    @abstractmethod
    def token_rows(self, ids: Tensor) -> Tensor:
        """The embeddings of `ids`, (B, T): (B, T, dim), a tensor of its own."""

    @abstractmethod
    def position_rows(self, start: int, end: int) -> Tensor:
        """The learned embeddings of positions start to end - 1, (T, dim). Asked for only if the config has them."""

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KVCache | None = None, last: int = 1) -> tuple[Tensor, KVCache]:
        """Logits for the token after `ids`, and the cache to hand in with the next, longer sequence.

        ids: the WHOLE sequence, (B, n) int64. What is new is decided here: positions whose ids the cache has
        already seen are not computed again. last: of how many positions the logits are wanted. Returns fp32 (or fp64)
        logits, (B, last, vocab), and the cache, which is `cache` itself, brought up to date, or a new one for None.

        Raises CacheError for a cache that another model wrote, UsageError for an empty sequence.
        """
        cache = self._checked(ids, cache)
        new = cache.match(ids, self._variant(ids.shape[1]), last)
        return self._logits(self.extend(new, cache, cache.length)[:, -last:]), cache

    @torch.inference_mode()
    def append(self, new: Tensor, cache: KVCache | None, *, start: int) -> tuple[Tensor, KVCache]:
        """The forward pass without the guard: add `new`, (B, T), to the cache at positions from `start`, unasked.

        This is what a cache does that does not know its text. `compare` shows with it what goes wrong then.
        """
        cache = self._checked(new, cache)
        cache.reused, cache.computed = cache.length, new.shape[1]
        return self._logits(self.extend(new, cache, start)[:, -1:]), cache

    @torch.inference_mode()
    def all_logits(self, ids: Tensor) -> Tensor:
        """Logits after every position of `ids`, (B, n) int64, in one parallel pass: (B, n, vocab).

        They are those of step-by-step decoding. So a text that grows out of LongRoPE's short length is passed over
        twice, for the positions that a short text rotates otherwise than a long one does.
        """
        n = ids.shape[1]
        cuts = sorted({rotary.short_length for rotary in self.config.rotaries if rotary.is_long(n)} | {n})
        passes = [self.extend(ids[:, :cut], self._checked(ids, None), start=0) for cut in cuts]
        parts = [hidden[:, start:] for start, hidden in zip([0, *cuts], passes, strict=False)]
        return self._logits(torch.cat(parts, dim=1))

    def embed(self, new: Tensor, start: int) -> Tensor:
        """What the first block reads: (B, T) ids at positions from `start` to (B, T, dim)."""
        x = self.token_rows(new)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.config.learned_positions:
            end = start + new.shape[1]
            if end > self.config.learned_positions:
                raise UsageError(
                    f"the sequence has {end} positions, but the model has learned {self.config.learned_positions}"
                )
            x = x + self.position_rows(start, end)
        return x

    def _checked(self, ids: Tensor, cache: KVCache | None) -> KVCache:
        if ids.shape[1] == 0:
            raise UsageError("cannot decode an empty sequence: give at least one token")
        if cache is not None and cache.owner is None and cache.length == 0:
            cache.owner = self
        if cache is not None and cache.owner is not self:
            raise CacheError("this KV cache was written by another model")
        return KVCache(self, self.kv_dtype) if cache is None else cache

    def _variant(self, length: int) -> int:
        """How many rotations a sequence of this length takes the long frequencies of."""
        return sum(rotary.is_long(length) for rotary in self.config.rotaries)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
