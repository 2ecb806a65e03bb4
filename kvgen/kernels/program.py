"""Writes a decoder as a list of operations over buffers, for the kernels to run."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from torch import Tensor

from kvgen.kernels.packed import PackedMatrix
from kvgen.kernels.structs import Op, OpKind
from kvgen.model.config import DecoderConfig


class Slot(IntEnum):
    """The buffers of a run, (rows, width) fp32 each."""

    X = 0  # the residual stream
    NORMED = 1
    Q = 2
    K = 3
    V = 4
    MIXED = 5  # output of attention, before its projection
    OUT = 6  # output of mixer or MLP, if a norm follows
    GATE = 7
    UP = 8
    LOGITS = 9


_ACCUMULATE, _SAME_INPUT = 1, 2  # flags
_NORM_MODES = MappingProxyType({"rms": 0, "layer": 1})
_ACTIVATIONS = MappingProxyType({"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3})


def slot_widths(config: DecoderConfig) -> tuple[int, ...]:
    """Return the width of each `Slot`."""
    attention, dim, hidden = config.attention, config.dim, config.mlp.width
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return dim, dim, queries, keys, keys, queries, dim, hidden, hidden, config.vocab_size


class ProgramBuilder:
    """Appends the operations of `kvgen.model.decoder`, block by block, to `ops`."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, PackedMatrix | Tensor]) -> None:
        """weights: packed matrices and fp32 vectors, by the decoder's parameter names."""
        self.config, self.weights = config, weights
        self.ops: list[Op] = []
        self._rounded: tuple[Slot, int, int] | None = None  # the input that is already rounded: slot, kind, group

    def block(self, i: int) -> None:
        parallel, norms = self.config.parallel, self.config.norms
        read = self._block_norm(i, "attn_norm")
        self._attention(i, read)
        if parallel:  # the MLP reads x before attention is added
            self._mlp(i, self._block_norm(i, "ffn_norm") if "ffn_norm" in norms else read)
        self._add(i, "attn.output", Slot.MIXED, "post_attention_norm")
        if not parallel:
            self._mlp(i, self._block_norm(i, "ffn_norm"))
        self._add(i, "ffn.down", Slot.GATE if self.config.layers[i].ffn.gated else Slot.UP, "post_ffw_norm")

    def head(self) -> None:
        self._norm("output_norm", Slot.X, Slot.NORMED, self.config.dim)
        self._linear("token_embd" if self.config.tied_head else "output", Slot.NORMED, Slot.LOGITS)

    def _attention(self, i: int, read: Slot) -> None:
        spec, name = self.config.layers[i].mixer, f"blk.{i}.attn"
        for part, slot in (("q", Slot.Q), ("k", Slot.K), ("v", Slot.V)):
            self._linear(f"{name}.{part}", read, slot)
        for part, slot, heads in (("q", Slot.Q, spec.heads), ("k", Slot.K, spec.kv_heads)):
            if spec.qk_norm is not None:
                width = heads * spec.head_dim if spec.qk_norm == "all" else spec.head_dim
                self._norm(f"{name}.{part}_norm", slot, slot, width)
            if spec.rotary is not None:
                table = self.config.rotaries.index(spec.rotary)
                self._write(OpKind.ROTATE, slot, slot, mode=table, width=spec.head_dim, heads=heads)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        sizes = {"width": spec.head_dim, "heads": spec.heads, "kv_heads": spec.kv_heads, "layer": i}
        scores = {"scale": scale, "softcap": spec.softcap or 0}
        self._write(OpKind.ATTEND, Slot.Q, Slot.MIXED, other=Slot.K, third=Slot.V, **sizes, **scores)

    def _mlp(self, i: int, read: Slot) -> None:
        spec, name = self.config.layers[i].ffn, f"blk.{i}.ffn"
        self._linear(f"{name}.up", read, Slot.UP)
        if spec.gated:
            self._linear(f"{name}.gate", read, Slot.GATE)
        slot, other = (Slot.GATE, Slot.UP) if spec.gated else (Slot.UP, -1)
        self._write(OpKind.ACTIVATE, slot, slot, mode=_ACTIVATIONS[spec.activation], other=other)

    def _add(self, i: int, part: str, read: Slot, norm: str) -> None:
        """Project the output of mixer or MLP, normalize it if the block has the norm, and add it to x."""
        scale = self.config.residual_scale
        if norm not in self.config.norms:
            self._linear(f"blk.{i}.{part}", read, Slot.X, scale=scale, flags=_ACCUMULATE)
            return
        self._linear(f"blk.{i}.{part}", read, Slot.OUT)
        self._norm(f"blk.{i}.{norm}", Slot.OUT, Slot.OUT, self.config.dim)
        self._write(OpKind.ADD, Slot.OUT, Slot.X, scale=scale)

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
        key = (src, weight.kind, weight.group)
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
