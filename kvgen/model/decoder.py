"""The decoder in torch operations, for any device and dtype: the readable statement of what the kernels compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.attention import AttentionModule
from kvgen.model.causal_lm import CausalLM, Pass, Span, positions_of
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE
from kvgen.model.layers import Embedding, Linear, MLPModule, RotaryTables, make_norm
from kvgen.model.mamba2 import Mamba2Module
from kvgen.model.mixers import Attention, Mamba2, Mixer, ShortConv
from kvgen.model.moe import MoEModule
from kvgen.model.short_conv import ShortConvModule

# The module for each dataclass of a layer's mixer and ffn. A mixer takes (x, Pass) and keeps its past in a `State`.
MIXERS: dict[type[Mixer], type[nn.Module]] = {
    Attention: AttentionModule,
    ShortConv: ShortConvModule,
    Mamba2: Mamba2Module,
}
FFNS: dict[type, type[nn.Module]] = {MLP: MLPModule, MoE: MoEModule}


class Block(nn.Module):
    """One layer: mixer and MLP with their norms and residuals."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        mixer, ffn = config.layers[layer].mixer, config.layers[layer].ffn
        self.attn_norm = _block_norm(config, "attn_norm")
        self.attn = MIXERS[type(mixer)](mixer, config, layer)
        self.post_attention_norm = _block_norm(config, "post_attention_norm")
        if ffn is not None:
            self.ffn_norm = _block_norm(config, "ffn_norm")
            self.ffn = FFNS[type(ffn)](ffn, config)
            self.post_ffw_norm = _block_norm(config, "post_ffw_norm")

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        normed = self.attn_norm(x)
        mixed = self.post_attention_norm(self.attn(normed, batch))
        if not hasattr(self, "ffn"):
            return x + self._scaled(mixed)
        if self.config.parallel:
            read = self.ffn_norm(x) if "ffn_norm" in self.config.norms else normed
            return x + self._scaled(mixed + self.post_ffw_norm(self.ffn(read)))
        x = x + self._scaled(mixed)
        return x + self._scaled(self.post_ffw_norm(self.ffn(self.ffn_norm(x))))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.config.residual_scale == 1 else x * self.config.residual_scale


class Decoder(CausalLM, nn.Module):
    """A decoder-only transformer, always in evaluation mode: it has no dropout."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = Embedding(config.vocab_size, config.dim)
        if config.learned_positions:
            self.position_embd = Embedding(config.learned_positions, config.dim)
        self.rotaries = nn.ModuleList(RotaryTables(rotary) for rotary in config.rotaries)
        self.blk = nn.ModuleList(Block(config, layer) for layer in range(len(config.layers)))
        self.output_norm = make_norm(config.norm, (config.dim,), config.norm_eps, bias="output_norm" in config.biases)
        bias = "output" in config.biases
        self.output = None if config.tied_head else Linear(config.dim, config.vocab_size, bias)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.token_embd.weight.dtype

    def extend(self, spans: Sequence[Span]) -> Tensor:
        positions = positions_of(spans)
        x = self.embed(spans, positions)  # (rows, dim)
        tables = [(cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]) for cos, sin in self.rotations(spans, positions)]
        batch = Pass(spans, dict(zip(self.config.rotaries, tables, strict=True)))
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


def _block_norm(config: DecoderConfig, name: str) -> nn.Module:
    if name not in config.norms:
        return nn.Identity()
    return make_norm(config.norm, (config.dim,), config.norm_eps, bias=name in config.biases)
