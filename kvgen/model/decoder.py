"""The decoder: one forward pass behind the contract `logits, cache = model(ids, cache)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.errors import CacheError, UsageError
from kvgen.model.attention import Attention, Tables, attention_mask
from kvgen.model.cache import KVCache
from kvgen.model.config import DecoderConfig
from kvgen.model.layers import MLP, Embedding, Linear, RotaryTables, make_norm


class Block(nn.Module):
    """One layer: attention over the positions, an MLP over each, with norms around them and residuals."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.parallel, self.scale = config.parallel, config.residual_scale
        self.attn_norm = _block_norm(config, "attn_norm")
        self.attn = Attention(config, layer)
        self.post_attention_norm = _block_norm(config, "post_attention_norm")
        self.ffn_norm = _block_norm(config, "ffn_norm")
        self.ffn = MLP(config)
        self.post_ffw_norm = _block_norm(config, "post_ffw_norm")

    def forward(self, x: Tensor, tables: Tables | None, mask: Tensor | None, cache: KVCache) -> Tensor:
        normed = _apply(self.attn_norm, x)
        mixed = _apply(self.post_attention_norm, self.attn(normed, tables, mask, cache))
        if self.parallel:
            read = normed if self.ffn_norm is None else self.ffn_norm(x)
            return x + self._scaled(mixed + _apply(self.post_ffw_norm, self.ffn(read)))
        x = x + self._scaled(mixed)
        return x + self._scaled(_apply(self.post_ffw_norm, self.ffn(_apply(self.ffn_norm, x))))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else x * self.scale


class Decoder(nn.Module):
    """A decoder-only transformer. Always in evaluation mode: it has no dropout and no stochastic depth."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = Embedding(config.vocab_size, config.dim)
        self.position_embd = Embedding(config.learned_positions, config.dim) if config.learned_positions else None
        self.rotaries = nn.ModuleList(RotaryTables(rotary) for rotary in config.rotaries)
        self.blk = nn.ModuleList(Block(config, layer) for layer in range(len(config.layers)))
        self.output_norm = make_norm(config.norm, (config.dim,), config.norm_eps, bias="output_norm" in config.biases)
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
        new = cache.match(ids, variant=self._variant(ids.shape[1]))
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
        """Logits after every position of `ids`, (B, n) int64, in one parallel pass: (B, n, vocab).

        They are those of step-by-step decoding. So a text that grows out of LongRoPE's short length is passed over
        twice, for the positions that a short text rotates otherwise than a long one does.
        """
        n = ids.shape[1]
        cuts = sorted({rotary.short_length for rotary in self.config.rotaries if rotary.is_long(n)} | {n})
        passes = [self._extend(ids[:, :cut], self._checked(ids, None), start=0) for cut in cuts]
        parts = [hidden[:, start:] for start, hidden in zip([0, *cuts], passes, strict=False)]
        return self._logits(torch.cat(parts, dim=1))

    def _checked(self, ids: Tensor, cache: KVCache | None) -> KVCache:
        if ids.shape[1] == 0:
            raise UsageError("cannot decode an empty sequence: give at least one token")
        if cache is not None and cache.owner is None and cache.length == 0:
            cache.owner = self
        if cache is not None and cache.owner is not self:
            raise CacheError("this KV cache was written by another model")
        return KVCache(self) if cache is None else cache

    def _variant(self, length: int) -> int:
        """How many rotations a sequence of this length takes the long frequencies of."""
        return sum(rotary.is_long(length) for rotary in self.config.rotaries)

    def _extend(self, new: Tensor, cache: KVCache, start: int) -> Tensor:
        """Compute `new`, (B, T), at positions from `start`, behind what is cached. Hidden states, (B, T, dim)."""
        config, past, count = self.config, cache.length, new.shape[1]
        x = self._embed(new, start)  # (B, T, dim)
        tables: dict[object, Tables | None] = {None: None}
        for rotary, make_tables in zip(config.rotaries, self.rotaries, strict=True):
            cos, sin = make_tables(start, count, rotary.is_long(past + count))
            tables[rotary] = (cos.to(x.dtype), sin.to(x.dtype))
        masks = {w: attention_mask(config, w, count, past, x.device, x.dtype) for w in config.windows}
        for layer, block in zip(config.layers, self.blk, strict=True):
            x = block(x, tables[layer.rotary], masks[layer.window], cache)
        cache.advance(new)
        return x

    def _embed(self, new: Tensor, start: int) -> Tensor:
        x: Tensor = self.token_embd(new)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.position_embd is not None:
            end = start + new.shape[1]
            if end > self.config.learned_positions:
                raise UsageError(
                    f"the sequence has {end} positions, but the model has learned {self.config.learned_positions}"
                )
            x = x + self.position_embd.weight[start:end]
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        normed = self.output_norm(hidden)
        logits: Tensor = F.linear(normed, self.token_embd.weight) if self.output is None else self.output(normed)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _block_norm(config: DecoderConfig, name: str) -> nn.Module | None:
    if name not in config.norms:
        return None
    return make_norm(config.norm, (config.dim,), config.norm_eps, bias=name in config.biases)


def _apply(norm: nn.Module | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    normed: Tensor = norm(x)
    return normed
