"""The operations of feed-forward layers."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from kvgen.kernels import structs
from kvgen.kernels.program import ACCUMULATE, GATHER, ROUTED, ProgramBuilder, Project
from kvgen.kernels.slots import Buffer, Slot
from kvgen.kernels.structs import OpKind
from kvgen.model.ffns import MLP, XIELU, ClampedSwiGLU, Combination, MoE, Router

ACTIVATIONS: Mapping[Combination, int] = MappingProxyType({"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4})
_XIELU, _CLAMPED_SWIGLU = 5, 7
_SCORES = MappingProxyType({"softmax": 0, "softmax_of_chosen": 1, "sigmoid": 2})


def write_ffn(program: ProgramBuilder, name: str, spec: Any, read: Slot) -> Project:
    """Compute all of a feed-forward layer but its last projection, which is returned. name: of the layer's weights."""
    if isinstance(spec, MLP):
        hidden = _hidden(program, name, spec, read, Buffer.GATE, Buffer.UP)
        return partial(program.linear, f"{name}.down", hidden)
    assert isinstance(spec, MoE)
    return _write_mixture(program, name, spec, read)


def _write_mixture(program: ProgramBuilder, name: str, spec: MoE, read: Slot) -> Project:
    router = ctypes.pointer(_router(program, name, spec.router))
    logits = Slot(Buffer.ROUTER, spec.router.experts)
    program.linear(f"{name}.router", read, logits)
    program.write(OpKind.ROUTE, logits, logits, router=router)
    source = read
    if spec.latent is not None:
        source = Slot(Buffer.LATENT, spec.latent)
        program.linear(f"{name}.latent_down", read, source)
    active = spec.router.active
    sizes = {"flags": ROUTED | GATHER, "active": active}
    hidden = _hidden(program, f"{name}.experts", spec.expert, source, Buffer.EXPERT_GATE, Buffer.EXPERT_UP, **sizes)
    out = Slot(Buffer.EXPERT_OUT, active * source.width)
    program.linear(f"{name}.experts.down", hidden, out, flags=ROUTED)

    def combine(dst: Slot, scale: float, flags: int) -> None:
        program.write(OpKind.COMBINE, out, dst, scale=scale, flags=flags, router=router)

    def project_experts(dst: Slot, scale: float, flags: int) -> None:
        if spec.latent is None:
            combine(dst, scale, flags)
            return
        added = Slot(Buffer.EXPERTS, spec.latent)
        combine(added, 1, 0)
        program.linear(f"{name}.latent_up", added, dst, scale, flags)

    if spec.shared is None:
        return project_experts
    shared = _hidden(program, f"{name}.shared", spec.shared, read, Buffer.SHARED_GATE, Buffer.SHARED_UP)
    share = Slot(Buffer.SHARE, 1)
    if spec.shared_gate:
        program.linear(f"{name}.shared_gate", read, share)

    def project(dst: Slot, scale: float, flags: int) -> None:
        project_experts(dst, scale, flags)
        if not spec.shared_gate:
            program.linear(f"{name}.shared.down", shared, dst, scale, ACCUMULATE)
            return
        output = Slot(Buffer.SHARED_OUT, dst.width)
        program.linear(f"{name}.shared.down", shared, output)
        program.write(OpKind.ADD, output, dst, other=share, scale=scale, flags=ACCUMULATE)

    return project


def _router(program: ProgramBuilder, name: str, spec: Router) -> structs.Router:
    router = structs.Router(
        *(spec.experts, spec.active, _SCORES[spec.scores], spec.normalize),
        *(spec.groups, spec.active_groups, spec.group_top),
        *(spec.smallest_sum, spec.added_to_sum, spec.scale),
        program.vector(f"{name}.router.selection.bias"),
    )
    program.kept.append(router)
    return router


def _hidden(
    program: ProgramBuilder,
    name: str,
    spec: MLP,
    read: Slot,
    gate_buffer: Buffer,
    up_buffer: Buffer,
    flags: int = 0,
    active: int = 1,
) -> Slot:
    """Compute the hidden layer of an MLP, or of `active` experts of each row; return its slot."""
    gate, up = (Slot(buffer, active * spec.width) for buffer in (gate_buffer, up_buffer))
    program.linear(f"{name}.up", read, up, flags=flags)
    if spec.gated:
        program.linear(f"{name}.gate", read, gate, flags=flags)
    slot, other = (gate, up) if spec.gated else (up, None)
    activation = spec.activation
    numbers: dict[str, Any] = {}
    if isinstance(activation, XIELU):
        numbers = {"scale": activation.positive, "slope": activation.negative}
        numbers |= {"softcap": activation.linear, "eps": activation.limit}
        mode = _XIELU
    elif isinstance(activation, ClampedSwiGLU):
        mode, numbers = _CLAMPED_SWIGLU, {"scale": activation.alpha, "eps": activation.limit}
    else:
        mode = ACTIVATIONS[activation]
    program.write(OpKind.ACTIVATE, slot, slot, mode=mode, other=other, **numbers)
    return slot
