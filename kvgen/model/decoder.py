"""The decoder in torch's own operations: it runs on any device, and says what the kernels have to compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.attention import AttentionModule
from kvgen.model.causal_lm import CausalLM, Pass, Span, positions_of
from kvgen.model.config import MLP, Attention, DecoderConfig
from kvgen.model.layers import Embedding, Linear, MLPModule, RotaryTables, make_norm

MIXERS = {Attention: AttentionModule}
FFNS = {MLP: MLPModule}
"""The module for each kind of a layer's parts."""


class Block(nn.Module):
    """One layer: its mixer over the positions, its MLP over each, with norms around them and residuals."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.parallel, self.scale = config.parallel, config.residual_scale
        self.attn_norm = _block_norm(config, "attn_norm")
        spec = config.layers[layer]
        self.attn = MIXERS[type(spec.mixer)](spec.mixer, config, layer)
        self.post_attention_norm = _block_norm(config, "post_attention_norm")
        self.ffn_norm = _block_norm(config, "ffn_norm")
        self.ffn = FFNS[type(spec.ffn)](spec.ffn, config)
        self.post_ffw_norm = _block_norm(config, "post_ffw_norm")

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        normed = _apply(self.attn_norm, x)
        mixed = _apply(self.post_attention_norm, self.attn(normed, batch))
        if self.parallel:
            read = normed if self.ffn_norm is None else self.ffn_norm(x)
            return x + self._scaled(mixed + _apply(self.post_ffw_norm, self.ffn(read)))
        x = x + self._scaled(mixed)
        return x + self._scaled(_apply(self.post_ffw_norm, self.ffn(_apply(self.ffn_norm, x))))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else x * self.scale


class Decoder(CausalLM, nn.Module):
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

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.token_embd.weight.dtype

    def extend(self, spans: Sequence[Span]) -> Tensor:
        config, positions = self.config, positions_of(spans)
        x = self.embed(spans, positions)  # (rows, dim)
        tables = [(cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]) for cos, sin in self.rotations(spans, positions)]
        batch = Pass(spans, dict(zip(config.rotaries, tables, strict=True)))
        for block in self.blk:
            x = block(x, batch)
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
