"""What the kernels are to compute, as a list of operations over buffers. The structs are those of kernels.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from torch import Tensor

from kvgen.kernels.packed import PackedMatrix, Weight
from kvgen.model.config import DecoderConfig


class Kind(IntEnum):
    """`OpKind`"""

    NORM = 0
    LINEAR = 1
    ROTATE = 2
    ATTEND = 3
    ACTIVATE = 4
    ADD = 5


class Slot(IntEnum):
    """The buffers of a run, (B * T, width) fp32 each."""

    X = 0  # the residual stream
    NORMED = 1
    Q = 2
    K = 3
    V = 4
    MIXED = 5  # what attention returns, before its projection
    OUT = 6  # what is added to the stream, where a norm comes first
    GATE = 7
    UP = 8
    LOGITS = 9


_ACCUMULATE, _SAME_INPUT = 1, 2
_NORM_MODES = MappingProxyType({"rms": 0, "layer": 1, "l2": 2})
_ACTIVATIONS = MappingProxyType({"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3})
_L2_EPS = 1e-12  # of torch.nn.functional.normalize


class Op(ctypes.Structure):
    """`Op`"""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "src", "dst", "other", "third")),
        *((name, ctypes.c_int32) for name in ("mode", "width", "heads", "kv_heads", "layer", "flags")),
        *((name, ctypes.c_float) for name in ("eps", "scale", "softcap")),
        ("weight", ctypes.POINTER(Weight)),
        ("vector", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("vector_size", ctypes.c_int64),
    )


def slot_widths(config: DecoderConfig) -> dict[Slot, int]:
    """The width of each buffer but that of the logits, which is of another size than the others."""
    attention, dim, ffn = config.attention, config.dim, config.mlp.width
    heads, kv_heads = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    widths = (dim, dim, heads, kv_heads, kv_heads, heads, dim, ffn, ffn)
    return dict(zip(Slot, widths, strict=False))


class Programmer:
    """Writes the operations of a decoder, block by block, as `kvgen.model.decoder` states them."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, PackedMatrix | Tensor]) -> None:
        """weights: matrices packed, and vectors in fp32, by the decoder's names for them."""
        self.config, self.weights = config, weights
        self.ops: list[Op] = []
        self._rounded: tuple[Slot, int, int] | None = None  # the input that is rounded already, and how

    def block(self, i: int) -> None:
        """Attention, then an MLP; or, of a parallel block, both of what came in."""
        config = self.config
        read = self._block_norm(i, "attn_norm", Slot.X)
        self._attention(i, read)
        if config.parallel:  # its MLP reads the stream before attention is added to it
            self._mlp(i, read if "ffn_norm" not in config.norms else self._block_norm(i, "ffn_norm", Slot.X))
        self._add(i, "attn.output", Slot.MIXED, "post_attention_norm")
        if not config.parallel:
            self._mlp(i, self._block_norm(i, "ffn_norm", Slot.X))
        self._add(i, "ffn.down", Slot.GATE if config.layers[i].ffn.gated else Slot.UP, "post_ffw_norm")

    def head(self) -> None:
        """Logits of the stream."""
        self._norm("output_norm", Slot.X, Slot.NORMED, self.config.norm, self.config.dim, self.config.norm_eps)
        self._linear("token_embd" if self.config.tied_head else "output", Slot.NORMED, Slot.LOGITS)

    def _attention(self, i: int, read: Slot) -> None:
        spec, name = self.config.layers[i].mixer, f"blk.{i}.attn"
        for part, slot in (("q", Slot.Q), ("k", Slot.K), ("v", Slot.V)):
            self._linear(f"{name}.{part}", read, slot)
        for slot, heads in ((Slot.Q, spec.heads), (Slot.K, spec.kv_heads)):
            if spec.qk_norm is not None:
                norm = spec.qk_norm
                width = heads * spec.head_dim if norm.over == "all" else spec.head_dim
                eps = _L2_EPS if norm.kind == "l2" else norm.eps
                self._norm(f"{name}.{slot.name.lower()}_norm", slot, slot, norm.kind, width, eps)
            if spec.rotary is not None:
                table = self.config.rotaries.index(spec.rotary)
                self._write(Kind.ROTATE, slot, slot, mode=table, width=spec.head_dim, heads=heads)
        self._write(
            Kind.ATTEND,
            Slot.Q,
            Slot.MIXED,
            other=Slot.K,
            third=Slot.V,
            width=spec.head_dim,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            layer=i,
            scale=spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            softcap=spec.softcap or 0,
        )

    def _mlp(self, i: int, read: Slot) -> None:
        spec, name = self.config.layers[i].ffn, f"blk.{i}"
        mode = _ACTIVATIONS[spec.activation]
        self._linear(f"{name}.ffn.up", read, Slot.UP)
        if spec.gated:
            self._linear(f"{name}.ffn.gate", read, Slot.GATE)
            self._write(Kind.ACTIVATE, Slot.GATE, Slot.GATE, mode=mode, other=Slot.UP)
        else:
            self._write(Kind.ACTIVATE, Slot.UP, Slot.UP, mode=mode, other=-1)

    def _add(self, i: int, part: str, read: Slot, norm: str) -> None:
        """Project what a part of the block made, and add it to the stream."""
        scale = self.config.residual_scale
        if norm not in self.config.norms:
            self._linear(f"blk.{i}.{part}", read, Slot.X, scale=scale, flags=_ACCUMULATE)
            return
        self._linear(f"blk.{i}.{part}", read, Slot.OUT)
        self._norm(f"blk.{i}.{norm}", Slot.OUT, Slot.OUT, self.config.norm, self.config.dim, self.config.norm_eps)
        self._write(Kind.ADD, Slot.OUT, Slot.X, scale=scale)

    def _block_norm(self, i: int, norm: str, read: Slot) -> Slot:
        """The slot with what is normed, if the block has that norm."""
        if norm not in self.config.norms:
            return read
        config = self.config
        self._norm(f"blk.{i}.{norm}", read, Slot.NORMED, config.norm, config.dim, config.norm_eps)
        return Slot.NORMED

    def _norm(self, name: str, src: Slot, dst: Slot, kind: str, width: int, eps: float) -> None:
        weight = self.weights.get(f"{name}.weight")
        size = weight.numel() if isinstance(weight, Tensor) else 0
        self._write(
            Kind.NORM,
            src,
            dst,
            mode=_NORM_MODES[kind],
            width=width,
            eps=eps,
            vector=weight.data_ptr() if isinstance(weight, Tensor) else None,
            vector_size=size,
            bias=self._bias(name),
        )

    def _linear(self, name: str, src: Slot, dst: Slot, scale: float = 1, flags: int = 0) -> None:
        packed = self.weights[f"{name}.weight"]
        assert isinstance(packed, PackedMatrix)
        key = (src, packed.weight.kind, packed.weight.group)
        if self._rounded == key:
            flags |= _SAME_INPUT
        bias = self._bias(name)
        self._write(Kind.LINEAR, src, dst, scale=scale, flags=flags, weight=ctypes.pointer(packed.weight), bias=bias)
        if packed.weight.group and dst != src:
            self._rounded = key

    def _bias(self, name: str) -> int | None:
        bias = self.weights.get(f"{name}.bias")
        return bias.data_ptr() if isinstance(bias, Tensor) else None

    def _write(self, kind: Kind, src: Slot, dst: Slot, **fields: object) -> None:
        self.ops.append(Op(kind=kind, src=src, dst=dst, **fields))
        if self._rounded is not None and self._rounded[0] == dst:
            self._rounded = None
