"""The decoder in torch operations, for any device and dtype: the readable statement of what the kernels compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.altup import StreamsModule
from kvgen.model.attention import AttentionModule
from kvgen.model.block import Block
from kvgen.model.causal_lm import CausalLM
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.delta_net import DeltaNetModule
from kvgen.model.ffns import MLP, MLPAndExperts, MoE, SparseMLP
from kvgen.model.latent_attention import LatentAttentionModule
from kvgen.model.layer_inputs import LayerInputsModule
from kvgen.model.layers import Embedding, Linear, MLPModule, RotaryTables, make_norm
from kvgen.model.mamba import MambaModule
from kvgen.model.mamba2 import Mamba2Module
from kvgen.model.mixers import (
    Attention,
    DeltaNet,
    LatentAttention,
    Mamba,
    Mamba2,
    Mixer,
    Parallel,
    SharedAttention,
    ShortConv,
)
from kvgen.model.mlp_and_experts import MLPAndExpertsModule
from kvgen.model.moe import MoEModule
from kvgen.model.shared_attention import SharedAttentionModule
from kvgen.model.short_conv import ShortConvModule
from kvgen.model.spans import Pass, Span, ids_of, positions_of
from kvgen.model.sparse_mlp import SparseMLPModule

# The module for each dataclass of a layer's mixer and ffn. A mixer takes (x, Pass) and keeps its past in a `State`:
# that with its number in a cache.
MIXERS: dict[type[Mixer], type[nn.Module]] = {
    Attention: AttentionModule,
    LatentAttention: LatentAttentionModule,
    ShortConv: ShortConvModule,
    Mamba: MambaModule,
    Mamba2: Mamba2Module,
    DeltaNet: DeltaNetModule,
}
FFNS: dict[type, type[nn.Module]] = {
    MLP: MLPModule,
    MoE: MoEModule,
    MLPAndExperts: MLPAndExpertsModule,
    SparseMLP: SparseMLPModule,
}


class ParallelModule(nn.ModuleList):
    """The module of `mixers.Parallel`."""

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: (rows, dim). Returns (rows, dim)."""
        return torch.stack([mixer(x, batch) for mixer in self]).sum(0)


class Decoder(CausalLM, nn.Module):
    """A decoder-only transformer, always in evaluation mode: it has no dropout."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = Embedding(config.vocab_size, config.dim)
        if config.learned_positions:
            self.position_embd = Embedding(config.learned_positions, config.dim)
        self.rotaries = nn.ModuleList(RotaryTables(rotary) for rotary in config.rotaries)
        states = accumulate((len(layer.mixers) for layer in config.layers), initial=0)
        parts = map(partial(_make_parts, config), config.layers, states)
        self.blk = nn.ModuleList(Block(config, number, *each) for number, each in enumerate(parts))
        inputs, altup = config.layer_inputs, config.altup
        self.inputs = None if inputs is None else LayerInputsModule(inputs, config)
        self.streams = None if altup is None else StreamsModule(altup, config)
        self.output_norm = make_norm(config.norm, (config.dim,), config.norm_eps, bias="output_norm" in config.biases)
        bias = "output" in config.biases
        self.output = None if config.tied_head else Linear(config.dim, config.vocab_size, bias)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.token_embd.weight.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.token_embd.weight.device

    def extend(self, spans: Sequence[Span]) -> Tensor:
        positions = positions_of(spans, self.device)
        x = self.embed(spans, positions)  # (rows, dim)
        tables = [(cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]) for cos, sin in self.rotations(spans, positions)]
        inputs = None if self.inputs is None else self.inputs(ids_of(spans, self.device), x)
        batch = Pass(spans, dict(zip(self.config.rotaries, tables, strict=True)), layer_inputs=inputs)
        x = x if self.streams is None else self.streams.made_of(x)
        for block in self.blk:
            x = block(x, batch)
        x = x if self.streams is None else self.streams.merged(x)
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


def _make_parts(config: DecoderConfig, layer: Layer, state: int) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the mixer and the feed-forward layer of a block. state: number of the mixer's."""
    ffn = None if layer.ffn is None else FFNS[type(layer.ffn)](layer.ffn, config)
    return _make_mixer(layer.mixer, config, state), ffn


def _make_mixer(
    mixer: Mixer | Parallel | SharedAttention | None, config: DecoderConfig, state: int
) -> nn.Module | None:
    if mixer is None:
        return None
    if isinstance(mixer, SharedAttention):
        return SharedAttentionModule(mixer, config)
    if isinstance(mixer, Parallel):
        parts = enumerate(mixer.mixers)
        return ParallelModule(MIXERS[type(part)](part, config, state + i, f"attn.{i}") for i, part in parts)
    return MIXERS[type(mixer)](mixer, config, state)
