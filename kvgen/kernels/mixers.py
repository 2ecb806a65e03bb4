"""The operations of mixers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from kvgen.kernels import structs
from kvgen.kernels.program import ProgramBuilder, Project
from kvgen.kernels.slots import Buffer, Slot
from kvgen.kernels.structs import OpKind
from kvgen.model.mixers import Attention, DeltaNet, Mamba2, ShortConv

_SILU, _SIGMOID = 0, 6  # activations
_GATED_CONVOLUTION = 1

WriteMixer = Callable[[ProgramBuilder, str, Any, Slot, int], Project]
"""Computes all of a mixer but its last projection, which is returned. Gets the name of its weights, its dataclass, what
it reads, and its number among the mixers of its kind: those of attention, or recurrent ones."""


def write_attention(program: ProgramBuilder, name: str, spec: Attention, read: Slot, layer: int) -> Project:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    q, k, v, mixed = Slot(Buffer.Q, queries), Slot(Buffer.K, keys), Slot(Buffer.V, keys), Slot(Buffer.MIXED, queries)
    gate = Slot(Buffer.ATTENTION_GATE, queries)
    for part, slot in (("q", q), ("k", k), ("k" if spec.keys_as_values else "v", v)):
        program.linear(f"{name}.{part}", read, slot)
    if spec.output_gate:
        program.linear(f"{name}.gate", read, gate)
    if spec.value_norm:
        program.rms_norm(None, v, v, spec.head_dim)
    for part, slot, rotary in (("q", q, spec.query_rotary or spec.rotary), ("k", k, spec.rotary)):
        width = slot.width if spec.qk_norm == "all" else spec.head_dim
        if spec.qk_norm not in (None, "rotated-head"):
            program.norm(f"{name}.{part}_norm", slot, slot, width)
        if rotary is not None:
            table, heads = program.config.rotaries.index(rotary), slot.width // spec.head_dim
            program.write(OpKind.ROTATE, slot, slot, mode=table, width=spec.head_dim, heads=heads)
        if spec.qk_norm == "rotated-head":
            program.norm(f"{name}.{part}_norm", slot, slot, width)
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    sizes = {"width": spec.head_dim, "heads": spec.heads, "kv_heads": spec.kv_heads, "layer": layer}
    scores = {"scale": scale, "softcap": spec.softcap or 0, "vector": program.vector(f"{name}.sinks.weight")}
    program.write(OpKind.ATTEND, q, mixed, other=k, third=v, **sizes, **scores)
    if spec.output_gate:
        program.write(OpKind.ACTIVATE, gate, mixed, mode=_SIGMOID, other=mixed)
    return partial(program.linear, f"{name}.output", mixed)


def write_short_conv(program: ProgramBuilder, name: str, spec: ShortConv, read: Slot, layer: int) -> Project:
    projected, out = Slot(Buffer.PROJECTED, 3 * spec.channels), Slot(Buffer.RECURRED, spec.channels)
    program.linear(f"{name}.in_proj", read, projected)
    _convolve(program, name, projected, out, width=spec.width, layer=layer, mode=_GATED_CONVOLUTION)
    return partial(program.linear, f"{name}.out_proj", out)


def write_mamba2(program: ProgramBuilder, name: str, spec: Mamba2, read: Slot, layer: int) -> Project:
    projected = Slot(Buffer.PROJECTED, spec.inner + spec.convolved + spec.heads)
    convolved, out = Slot(Buffer.CONVOLVED, spec.convolved), Slot(Buffer.RECURRED, spec.inner)
    program.linear(f"{name}.in_proj", read, projected)
    _convolve(program, name, projected, convolved, width=spec.width, layer=layer, column=spec.inner)
    vectors = [program.vector(f"{name}.{part}.weight") for part in ("dt", "A", "D")]
    sizes = spec.heads, spec.head_dim, spec.groups, spec.size, *spec.dt_limit
    recurrence = _recurrence(program, *sizes, *vectors)
    column = spec.inner + spec.convolved
    program.write(OpKind.SCAN, convolved, out, other=projected, column=column, layer=layer, recurrence=recurrence)
    norm = partial(program.rms_norm, f"{name}.norm", out, out, spec.inner // spec.groups)
    if spec.norm == "before-gate":
        norm()
    program.write(OpKind.ACTIVATE, projected, out, mode=_SILU, other=out)
    if spec.norm == "after-gate":
        norm()
    return partial(program.linear, f"{name}.out_proj", out)


def write_delta_net(program: ProgramBuilder, name: str, spec: DeltaNet, read: Slot, layer: int) -> Project:
    projected, gate = Slot(Buffer.PROJECTED, spec.convolved), Slot(Buffer.RECURRENT_GATE, spec.inner)
    decays, betas = Slot(Buffer.DECAYS, spec.heads), Slot(Buffer.BETAS, spec.heads)
    convolved, out = Slot(Buffer.CONVOLVED, spec.convolved), Slot(Buffer.RECURRED, spec.inner)
    for part, slot in (("in_proj", projected), ("gate", gate), ("a", decays), ("b", betas)):
        program.linear(f"{name}.{part}", read, slot)
    _convolve(program, name, projected, convolved, width=spec.width, layer=layer)
    vectors = [program.vector(f"{name}.{part}.weight") for part in ("dt", "A")]
    recurrence = _recurrence(program, spec.heads, spec.value_dim, spec.key_heads, spec.key_dim, 0, 0, *vectors)
    program.write(
        OpKind.DELTA,
        *(convolved, out),
        **{"other": decays, "third": betas, "layer": layer, "scale": spec.key_dim**-0.5, "recurrence": recurrence},
    )
    program.rms_norm(f"{name}.norm", out, out, spec.value_dim)
    program.write(OpKind.ACTIVATE, gate, out, mode=_SILU, other=out)
    return partial(program.linear, f"{name}.out_proj", out)


def _convolve(program: ProgramBuilder, name: str, src: Slot, dst: Slot, **fields: Any) -> None:
    weight, bias = program.vector(f"{name}.conv.weight"), program.vector(f"{name}.conv.bias")
    program.write(OpKind.CONVOLVE, src, dst, vector=weight, bias=bias, **fields)


def _recurrence(program: ProgramBuilder, *fields: Any) -> Any:
    recurrence = structs.Recurrence(*fields)
    program.kept.append(recurrence)
    return ctypes.pointer(recurrence)


MIXERS: Mapping[type, WriteMixer] = MappingProxyType(
    {
        Attention: write_attention,
        ShortConv: write_short_conv,
        Mamba2: write_mamba2,
        DeltaNet: write_delta_net,
    }
)
