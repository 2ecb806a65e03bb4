"""The decoder: one forward pass behind the contract `logits, cache = model(ids, cache)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.errors import CacheError, UsageError
from kvgen.model.attention import Attention, causal_mask
from kvgen.model.cache import KVCache
from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Embedding, GatedMLP, Linear, RMSNorm, RotaryTables


class Block(nn.Module):
    """One layer: attention over all positions, then an MLP over each, both behind a norm and a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = GatedMLP(config)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache) -> Tensor:
        x = x + self.attn(self.attn_norm(x), tables, mask, cache)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class Decoder(nn.Module):
    """A decoder-only transformer. Always in evaluation mode: it has no dropout and no stochastic depth."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = Embedding(config.vocab_size, config.dim)
        self.rotary = RotaryTables(config.rotary)
        self.blk = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.output_norm = RMSNorm(config.dim, config.norm_eps)
        self.output = (
            None if config.tied_head else Linear(config.dim, config.vocab_size, bias="output" in config.biases)
        )
        self.eval()

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """Logits for the token after `ids`, and the cache to hand in with the next, longer sequence.

        ids: the WHOLE sequence, (B, n) int64. What is new is decided here: positions whose ids the cache has
        already seen are not computed again. Returns fp32 (or fp64) logits, (B, 1, vocab), and the cache, which
        is `cache` itself, brought up to date, or a new one for None.

        Raises CacheError for a cache that another model wrote, UsageError for an empty sequence.
        """
        cache = self._checked(ids, cache)
        new = cache.match(ids)
        return self._logits(self._extend(new, cache, cache.length)[:, -1:]), cache

    @torch.inference_mode()
    def append(self, new: Tensor, cache: KVCache | None, *, start: int) -> tuple[Tensor, KVCache]:
        """The forward pass without the guard: add `new`, (B, T), to the cache at positions from `start`, unasked.

        This is what a cache does that does not know its text. `compare` shows with it what goes wrong then.
        """
        cache = self._checked(new, cache)
        cache.reused, cache.computed = cache.length, new.shape[1]
        return self._logits(self._extend(new, cache, start)[:, -1:]), cache

    @torch.inference_mode()
    def all_logits(self, ids: Tensor) -> Tensor:
        """Logits after every position of `ids`, (B, n) int64, in one parallel pass: (B, n, vocab)."""
        return self._logits(self._extend(ids, self._checked(ids, None), start=0))

    def _checked(self, ids: Tensor, cache: KVCache | None) -> KVCache:
        if ids.shape[1] == 0:
            raise UsageError("cannot decode an empty sequence: give at least one token")
        if cache is not None and cache.owner is None and cache.length == 0:
            cache.owner = self
        if cache is not None and cache.owner is not self:
            raise CacheError("this KV cache was written by another model")
        return KVCache(self) if cache is None else cache

    def _extend(self, new: Tensor, cache: KVCache, start: int) -> Tensor:
        """Compute `new`, (B, T), at positions from `start`, behind what is cached. Hidden states, (B, T, dim)."""
        count = new.shape[1]
        x: Tensor = self.token_embd(new)  # (B, T, dim)
        cos, sin = self.rotary(start, count)
        tables = (cos.to(x.dtype), sin.to(x.dtype))
        mask = causal_mask(count, cache.length + count, x.device)
        for block in self.blk:
            x = block(x, tables, mask, cache)
        cache.advance(new)
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        normed = self.output_norm(hidden)
        logits: Tensor = F.linear(normed, self.token_embd.weight) if self.output is None else self.output(normed)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
