"""Writes a decoder as a list of operations over buffers, for the kernels to run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from kvgen.kernels import structs
from kvgen.kernels.packed import PackedMatrix
from kvgen.kernels.slots import Slot, mixture_widths, mixtures_of
from kvgen.kernels.structs import Op, OpKind
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.ffns import MLP, XIELU, Combination, MLPAndExperts, MoE, Router, SparseMLP
from kvgen.model.mixers import Attention, DeltaNet, LatentAttention, Mamba, Mamba2, Rotary, SharedAttention, ShortConv

_ACCUMULATE, _SAME_INPUT, _ROUTED, _GATHER = 1, 2, 4, 8  # flags
_NORM_MODES = MappingProxyType({"rms": 0, "layer": 1})
_ACTIVATIONS: Mapping[Combination, int] = MappingProxyType(
    {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
)
_XIELU = 5
_SCORES = MappingProxyType({"softmax": 0, "softmax_of_chosen": 1, "sigmoid": 2})

# What the kernels implement: any other mechanism, or another field that differs from its default, is lacking.
_IMPLEMENTED: Mapping[type, frozenset[str]] = MappingProxyType(
    {
        Attention: frozenset(
            {"heads", "kv_heads", "head_dim", "rotary", "query_rotary", "window", "qk_norm", "scale", "softcap"}
        ),
        MLP: frozenset({"width", "gated", "activation"}),
        MoE: frozenset({"router", "expert", "shared", "shared_gate"}),
        Router: frozenset(
            {
                "experts",
                "active",
                "scores",
                "normalize",
                "smallest_sum",
                "scale",
                "selection_bias",
                "groups",
                "active_groups",
                "group_top",
            }
        ),
        Rotary: frozenset(
            {"inverse_frequencies", "scale", "long_frequencies", "short_length", "growth", "growth_length"}
        ),
        Layer: frozenset({"mixer", "ffn"}),
        DecoderConfig: frozenset(
            {
                "vocab_size",
                "context_length",
                "dim",
                "layers",
                "norm_eps",
                "tied_head",
                "norm",
                "norms",
                "biases",
                "parallel",
                "learned_positions",
                "logit_softcap",
                "embedding_scale",
                "residual_scale",
                "logit_scale",
            }
        ),
    }
)
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        LatentAttention.__name__: "latent attention",
        MLPAndExperts.__name__: "experts beside MLPs",
        SparseMLP.__name__: "sparse MLPs",
        ShortConv.__name__: "short convolutions",
        Mamba.__name__: "Mamba",
        Mamba2.__name__: "Mamba 2",
        DeltaNet.__name__: "gated delta nets",
    }
)  # else the name itself


def lacking(config: DecoderConfig) -> str | None:
    """Return the mechanisms of a decoder that the kernels lack, in words; None if they have them all."""
    return ", ".join(dict.fromkeys(_lacking(config))) or None


def _lacking(config: DecoderConfig) -> Iterator[str]:
    if any(layer.mixer is None for layer in config.layers):
        yield "layers without a mixer"
    if any(isinstance(layer.mixer, SharedAttention) for layer in config.layers):
        yield "keys and values shared between layers"
    if any(len(layer.mixers) > 1 for layer in config.layers):
        yield "mixers in parallel"
    parts = (part for layer in config.layers for part in (layer, *layer.mixers, layer.ffn))
    mixtures = mixtures_of(config)
    experts = [mlp for mixture in mixtures for mlp in (mixture.expert, mixture.shared) if mlp is not None]
    for part in (config, *config.rotaries, *parts, *(mixture.router for mixture in mixtures), *experts):
        yield from _lacking_fields(part)
    mlps = {layer.ffn: None for layer in config.layers if isinstance(layer.ffn, MLP)}
    for mlp in (*mlps, *experts):
        if not isinstance(mlp.activation, XIELU) and mlp.activation not in _ACTIVATIONS:
            yield f"the activation {mlp.activation}"
    heads = {(attention.heads, attention.kv_heads, attention.head_dim) for attention in config.attentions}
    of_mixtures = {mixture_widths(mixture, config.dim) for mixture in mixtures}
    if max(len(heads), len({mlp.width for mlp in mlps}), len(of_mixtures)) > 1:
        yield "layers of different sizes"


def _lacking_fields(part: Any) -> Iterator[str]:
    kind = type(part)
    if part is None:
        yield "layers without an MLP"
        return
    if kind not in _IMPLEMENTED:
        yield _WORDS.get(kind.__name__, kind.__name__)
        return
    for field in fields(part):
        if field.name not in _IMPLEMENTED[kind] and getattr(part, field.name) != field.default:
            yield field.name.replace("_", " ")


Project = Callable[[Slot, float, int], None]
"""Writes the output of a mixer or MLP, (rows, dim), into a slot, scaled, with flags."""


class ProgramBuilder:
    """Appends the operations of `kvgen.model.decoder`, block by block, to `ops`."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, PackedMatrix | Tensor]) -> None:
        """weights: packed matrices and fp32 vectors, by the decoder's parameter names."""
        self.config, self.weights = config, weights
        self.ops: list[Op] = []
        self.routers: list[structs.Router] = []  # operations point to them
        self._rounded: tuple[Slot, int, int, int] | None = None  # the input already rounded: slot, kind, group, flags

    def block(self, i: int) -> None:
        parallel, norms = self.config.parallel, self.config.norms
        read = self._block_norm(i, "attn_norm")
        self._attention(i, read)
        mixed = partial(self._linear, f"blk.{i}.attn.output", Slot.MIXED)
        if parallel:  # the MLP reads x before attention is added
            output = self._ffn(i, self._block_norm(i, "ffn_norm") if "ffn_norm" in norms else read)
            self._add(i, mixed, "post_attention_norm")
        else:
            self._add(i, mixed, "post_attention_norm")
            output = self._ffn(i, self._block_norm(i, "ffn_norm"))
        self._add(i, output, "post_ffw_norm")

    def head(self) -> None:
        self._norm("output_norm", Slot.X, Slot.NORMED, self.config.dim)
        self._linear("token_embd" if self.config.tied_head else "output", Slot.NORMED, Slot.LOGITS)

    def _attention(self, i: int, read: Slot) -> None:
        spec, name = self.config.layers[i].mixer, f"blk.{i}.attn"
        assert isinstance(spec, Attention)
        for part, slot in (("q", Slot.Q), ("k", Slot.K), ("v", Slot.V)):
            self._linear(f"{name}.{part}", read, slot)
        queries = Slot.Q, spec.heads, spec.query_rotary or spec.rotary
        for part, (slot, heads, rotary) in (("q", queries), ("k", (Slot.K, spec.kv_heads, spec.rotary))):
            width = heads * spec.head_dim if spec.qk_norm == "all" else spec.head_dim
            if spec.qk_norm not in (None, "rotated-head"):
                self._norm(f"{name}.{part}_norm", slot, slot, width)
            if rotary is not None:
                table = self.config.rotaries.index(rotary)
                self._write(OpKind.ROTATE, slot, slot, mode=table, width=spec.head_dim, heads=heads)
            if spec.qk_norm == "rotated-head":
                self._norm(f"{name}.{part}_norm", slot, slot, width)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        sizes = {"width": spec.head_dim, "heads": spec.heads, "kv_heads": spec.kv_heads, "layer": i}
        scores = {"scale": scale, "softcap": spec.softcap or 0}
        self._write(OpKind.ATTEND, Slot.Q, Slot.MIXED, other=Slot.K, third=Slot.V, **sizes, **scores)

    def _ffn(self, i: int, read: Slot) -> Project:
        """Compute all but the last projection, which is returned."""
        spec, name = self.config.layers[i].ffn, f"blk.{i}.ffn"
        if isinstance(spec, MLP):
            return partial(self._linear, f"{name}.down", self._hidden(name, spec, read, Slot.GATE, Slot.UP))
        assert isinstance(spec, MoE)
        router = ctypes.pointer(self._router(i, spec.router))
        self._linear(f"{name}.router", read, Slot.ROUTER)
        self._write(OpKind.ROUTE, Slot.ROUTER, Slot.ROUTER, router=router)
        flags = _ROUTED | _GATHER
        hidden = self._hidden(f"{name}.experts", spec.expert, read, Slot.EXPERT_GATE, Slot.EXPERT_UP, flags)
        self._linear(f"{name}.experts.down", hidden, Slot.EXPERT_OUT, flags=_ROUTED)
        if spec.shared is None:
            return partial(self._combine, router)
        shared = self._hidden(f"{name}.shared", spec.shared, read, Slot.SHARED_GATE, Slot.SHARED_UP)
        if spec.shared_gate:
            self._linear(f"{name}.shared_gate", read, Slot.SHARE)

        def project(dst: Slot, scale: float, flags: int) -> None:
            self._combine(router, dst, scale, flags)
            if not spec.shared_gate:
                self._linear(f"{name}.shared.down", shared, dst, scale, _ACCUMULATE)
                return
            self._linear(f"{name}.shared.down", shared, Slot.SHARED_OUT)
            self._write(OpKind.ADD, Slot.SHARED_OUT, dst, other=Slot.SHARE, scale=scale)

        return project

    def _router(self, i: int, spec: Router) -> structs.Router:
        bias = self.weights.get(f"blk.{i}.ffn.router.selection.bias")
        router = structs.Router(
            *(spec.experts, spec.active, _SCORES[spec.scores], spec.normalize),
            *(spec.groups, spec.active_groups, spec.group_top, spec.smallest_sum, spec.scale),
            bias.data_ptr() if isinstance(bias, Tensor) else None,
        )
        self.routers.append(router)
        return router

    def _combine(self, router: Any, dst: Slot, scale: float, flags: int) -> None:
        self._write(OpKind.COMBINE, Slot.EXPERT_OUT, dst, scale=scale, flags=flags, router=router)

    def _hidden(self, name: str, spec: MLP, read: Slot, gate: Slot, up: Slot, flags: int = 0) -> Slot:
        """Compute the hidden layer of an MLP in the slots `gate` and `up`; return which has it."""
        self._linear(f"{name}.up", read, up, flags=flags)
        if spec.gated:
            self._linear(f"{name}.gate", read, gate, flags=flags)
        slot, other = (gate, up) if spec.gated else (up, -1)
        if isinstance(spec.activation, XIELU):
            slopes = {"scale": spec.activation.positive, "slope": spec.activation.negative}
            slopes |= {"softcap": spec.activation.linear, "eps": spec.activation.limit}
            self._write(OpKind.ACTIVATE, slot, slot, mode=_XIELU, other=other, **slopes)
        else:
            self._write(OpKind.ACTIVATE, slot, slot, mode=_ACTIVATIONS[spec.activation], other=other)
        return slot

    def _add(self, i: int, project: Project, norm: str) -> None:
        """Project the output of mixer or MLP, normalize it if the block has the norm, and add it to x."""
        scale = self.config.residual_scale
        if norm not in self.config.norms:
            project(Slot.X, scale, _ACCUMULATE)
            return
        project(Slot.OUT, 1, 0)
        self._norm(f"blk.{i}.{norm}", Slot.OUT, Slot.OUT, self.config.dim)
        self._write(OpKind.ADD, Slot.OUT, Slot.X, other=-1, scale=scale)

    def _block_norm(self, i: int, norm: str) -> Slot:
        """Normalize x if the block has the norm; return the slot of the result."""
        if norm not in self.config.norms:
            return Slot.X
        self._norm(f"blk.{i}.{norm}", Slot.X, Slot.NORMED, self.config.dim)
        return Slot.NORMED

    def _norm(self, name: str, src: Slot, dst: Slot, width: int) -> None:
        vector = self.weights[f"{name}.weight"]
        assert isinstance(vector, Tensor)
        mode, bias = _NORM_MODES[self.config.norm], self._bias(name)
        weight = {"vector": vector.data_ptr(), "vector_size": vector.numel()}
        self._write(OpKind.NORM, src, dst, mode=mode, width=width, eps=self.config.norm_eps, bias=bias, **weight)

    def _linear(self, name: str, src: Slot, dst: Slot, scale: float = 1, flags: int = 0) -> None:
        matrix = self.weights[f"{name}.weight"]
        assert isinstance(matrix, PackedMatrix)
        weight = matrix.weight
        key = (src, weight.kind, weight.group, flags & _GATHER)
        if self._rounded == key:
            flags |= _SAME_INPUT
        pointer, bias = ctypes.pointer(weight), self._bias(name)
        self._write(OpKind.LINEAR, src, dst, scale=scale, flags=flags, weight=pointer, bias=bias)
        if weight.group and dst != src:
            self._rounded = key

    def _bias(self, name: str) -> int | None:
        bias = self.weights.get(f"{name}.bias")
        return bias.data_ptr() if isinstance(bias, Tensor) else None

    def _write(self, kind: OpKind, src: Slot, dst: Slot, **fields: object) -> None:
        self.ops.append(Op(kind=kind, src=src, dst=dst, **fields))
        if self._rounded is not None and self._rounded[0] == dst:
            self._rounded = None
