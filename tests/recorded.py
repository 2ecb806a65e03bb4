"""Small decoders with every operation of the kernels and every stored type, to be recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from kvgen.checkpoint.gguf_blocks import StoredBlocks
from kvgen.checkpoint.grouped import Grouped
from kvgen.kernels.decoder import KernelDecoder
from kvgen.kernels.packed import PackedMatrix
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.decoder import Decoder
from kvgen.model.ffns import MLP, XIELU, ClampedSwiGLU, MoE, Router
from kvgen.model.mixers import Attention, DeltaNet, Mamba2, Parallel, Rotary, ShortConv
from tests.test_kernels import random_blocks

ROTARY = Rotary((1.0, 0.1, 0.01))
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LLAMA = (Layer(Attention(8, 2, 32, Rotary(tuple(10000 ** (-i / 16) for i in range(16)))), MLP(256)),)
EXPERT = MLP(32)


@dataclass(frozen=True)
class Recorded:
    """A decoder. stored: the type of its matrices. kv: that of its cache. bits: of its activations."""

    layers: tuple[Layer, ...] = LLAMA
    stored: str = "F32"
    kv: torch.dtype = torch.float32
    dim: int = 64
    norm: str = "rms"
    biases: frozenset[str] = frozenset()
    bits: int = 16


def _llama(stored: str, kv: torch.dtype = torch.float32) -> Recorded:
    return Recorded(stored=stored, kv=kv, dim=256)


def _mixture(router: Router, expert: MLP = EXPERT, **more: object) -> Layer:
    return Layer(None, MoE(router, expert, **more))


MLPS = (
    Layer(Attention(2, 1, 32), None),
    *(
        Layer(None, MLP(64, gated=gated, activation=activation))
        for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2", XIELU(0.9, 0.7, 0.5, -1e-6))
        for gated in (True, False)
    ),
)
MIXTURES = (
    Layer(Attention(2, 1, 32), None),  # without any mixer there is no cache
    _mixture(Router(8, 2, normalize=True), shared=MLP(64)),
    _mixture(Router(8, 3, scores="sigmoid", selection_bias=True, groups=4, active_groups=2, group_top=2, scale=1.5)),
    _mixture(Router(20, 4, scores="softmax_of_chosen"), MLP(32, activation=ClampedSwiGLU(1.7, 0.5))),
    _mixture(Router(5, 2), shared=MLP(32), shared_gate=True, latent=32),
)
HYBRID = (
    Layer(Mamba2(6, 10, 2, 7, 4), MLP(40)),
    Layer(DeltaNet(6, 10, 2, 7, 4), None),
    Layer(ShortConv(70, 3), None),
    Layer(Parallel((Attention(2, 1, 16, ROTARY), Mamba2(2, 64, 1, 16, 2, (0.1, 0.5), "before-gate"))), None),
    Layer(DeltaNet(2, 64, 1, 32, 2), MLP(33, gated=False, activation="relu2")),
)
ATTENTIONS = (
    Layer(Attention(4, 2, 10, ROTARY, sinks=True, window=20), None),
    Layer(Attention(4, 2, 20, ROTARY, sinks=True, softcap=3.0), None),
    Layer(Attention(3, 1, 8, ROTARY, output_gate=True, qk_norm="head"), None),
    Layer(Attention(2, 2, 12, value_norm=True, keys_as_values=True, qk_norm="each-head"), None),
    Layer(Attention(2, 1, 32, ROTARY, window=70), None),
)
GGUF_TYPES = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
)
DECODERS: Mapping[str, Recorded] = MappingProxyType(
    {stored: _llama(stored) for stored in (*FLOATS, *GGUF_TYPES)}
    | {
        "cache in bfloat16": _llama("Q4_1", torch.bfloat16),
        "cache in int8": _llama("Q4_1", torch.int8),
        "attention": Recorded(ATTENTIONS),
        "attention, cache in bfloat16": Recorded(ATTENTIONS, kv=torch.bfloat16),
        "attention, cache in int8": Recorded(ATTENTIONS, kv=torch.int8),
        "activations": Recorded(MLPS),
        "layer norm and biases": Recorded(
            MLPS[:4], norm="layer", biases=frozenset({"attn_norm", "ffn.up", "ffn.down"})
        ),
        "hybrid": Recorded(HYBRID, biases=frozenset({"attn.conv", "attn.1.conv"})),
        "hybrid in Q4_1": Recorded(HYBRID, "Q4_1"),
        "mixtures": Recorded(MIXTURES),
        "mixtures in Q8_0": Recorded(MIXTURES, "Q8_0"),
        "mixtures in MXFP4": Recorded(MIXTURES, "MXFP4"),
        **{f"{stored}, 8 bits": replace(_llama(stored), bits=8) for stored in ("Q4_1", "Q6_K", "MXFP4")},
        "attention, 8 bits": Recorded(ATTENTIONS, bits=8),
        "attention, cache in bfloat16, 8 bits": Recorded(ATTENTIONS, kv=torch.bfloat16, bits=8),
        "attention, cache in int8, 8 bits": Recorded(ATTENTIONS, kv=torch.int8, bits=8),
    }
)


def make_decoder(recorded: Recorded) -> KernelDecoder:
    torch.manual_seed(0)
    more = {"norm": recorded.norm, "biases": recorded.biases}
    config = DecoderConfig(96, 512, recorded.dim, recorded.layers, 1e-5, tied_head=False, **more)
    weights: dict[str, PackedMatrix | Tensor] = {}
    for name, parameter in Decoder(config).requires_grad_(False).named_parameters():
        parameter.normal_(std=0.5 if parameter.ndim == 1 else 0.7 * parameter.shape[-1] ** -0.5)
        if name.endswith(".A.weight"):
            parameter.abs_().neg_()
        elif "norm" in name:
            parameter.add_(1)
        matrix = name.endswith(".weight") and parameter.ndim > 1 and "norm" not in name and ".conv." not in name
        weights[name] = PackedMatrix(_stored(parameter, recorded.stored)) if matrix else parameter
    decoder = KernelDecoder(config, weights)
    decoder.kv_dtype, decoder.activation_bits = recorded.kv, recorded.bits
    return decoder


def _stored(matrix: Tensor, stored: str) -> Tensor | Grouped:
    """A matrix of a size and a stored type, with weights of ordinary size."""
    if stored in FLOATS:
        return matrix.to(FLOATS[stored])
    *experts, rows, columns = matrix.shape
    if columns % (256 if "K" in stored or "XS" in stored else 32):
        return matrix
    count = matrix[..., 0].numel()
    blocks, _ = random_blocks(stored, count, columns)
    grouped = StoredBlocks(stored, blocks.reshape(count, -1), np.arange(count).reshape(*experts, rows)).whole()
    size = grouped.dequantized().view(*grouped.scales.shape, -1).square().mean(-1).sqrt()
    factor = torch.where(size > 0, 0.7 * columns**-0.5 / size, 0)
    mins = None if grouped.mins is None else (grouped.mins * factor).to(grouped.mins.dtype)
    return replace(grouped, scales=(grouped.scales * factor).to(grouped.scales.dtype), mins=mins)


def decode(decoder: KernelDecoder) -> None:
    """Compute in every way: a prompt in passes, steps, several sequences of different lengths at once, and batches."""
    ids = torch.randint(2, 96, (2, 150), generator=torch.Generator().manual_seed(1))
    cache, other = None, None
    for length in (70, 75, 149, 150):
        logits, cache = decoder.forward(ids[:1, :length], cache)
        assert logits.isfinite().all()
    _, other = decoder.forward(ids[1:, :30])
    decoder.forward_batch([ids[1:, :31], ids[:1, :140], ids[1:, :9]], [other, cache, None], [1, 3, 9])
    decoder.forward(ids[:, :40])
