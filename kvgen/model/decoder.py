"""The decoder in torch's own operations: it runs on any device, and says what the kernels have to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.attention import Attention, Tables, attention_mask
from kvgen.model.cached import CachedModel, Span, positions_of
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

    def forward(
        self, x: Tensor, tables: Tables | None, spans: Sequence[Span], masks: Sequence[Tensor | None]
    ) -> Tensor:
        normed = _apply(self.attn_norm, x)
        mixed = _apply(self.post_attention_norm, self.attn(normed, tables, spans, masks))
        if self.parallel:
            read = normed if self.ffn_norm is None else self.ffn_norm(x)
            return x + self._scaled(mixed + _apply(self.post_ffw_norm, self.ffn(read)))
        x = x + self._scaled(mixed)
        return x + self._scaled(_apply(self.post_ffw_norm, self.ffn(_apply(self.ffn_norm, x))))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else x * self.scale


class Decoder(CachedModel, nn.Module):
    """A decoder-only transformer. Always in evaluation mode: it has no dropout and no stochastic depth."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = Embedding(config.vocab_size, config.dim)
        if config.learned_positions:
            self.position_embd = Embedding(config.learned_positions, config.dim)
        self.rotaries = nn.ModuleList(RotaryTables(rotary) for rotary in config.rotaries)
        self.blk = nn.ModuleList(Block(config, layer) for layer in range(len(config.layers)))
        self.output_norm = make_norm(config.norm, (config.dim,), config.norm_eps, bias="output_norm" in config.biases)
        self.output = (
            None if config.tied_head else Linear(config.dim, config.vocab_size, bias="output" in config.biases)
        )
        self.eval()

    def extend(self, spans: Sequence[Span]) -> Tensor:
        config, positions = self.config, positions_of(spans)
        x = self.embed(spans, positions)  # (rows, dim)
        tables: dict[object, Tables | None] = {None: None}
        for rotary, (cos, sin) in zip(config.rotaries, self.rotations(spans, positions), strict=True):
            tables[rotary] = (cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None])
        masks = {
            window: [
                attention_mask(config, window, span.new.shape[1], span.cache.length, x.device, x.dtype)
                for span in spans
            ]
            for window in config.windows
        }
        for layer, block in zip(config.layers, self.blk, strict=True):
            x = block(x, tables[layer.rotary], spans, masks[layer.window])
        for span in spans:
            span.cache.advance(span.new)
        return x

    def token_rows(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.token_embd(ids)
        return rows

    def position_rows(self, positions: Tensor) -> Tensor:
        rows: Tensor = self.position_embd(positions)
        return rows

    def head(self, hidden: Tensor) -> Tensor:
        normed = self.output_norm(hidden)
        logits: Tensor = F.linear(normed, self.token_embd.weight) if self.output is None else self.output(normed)
        return logits


def _block_norm(config: DecoderConfig, name: str) -> nn.Module | None:
    if name not in config.norms:
        return None
    return make_norm(config.norm, (config.dim,), config.norm_eps, bias=name in config.biases)


def _apply(norm: nn.Module | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    normed: Tensor = norm(x)
    return normed
