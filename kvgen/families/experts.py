"""Read what mixtures of experts have in common: the router, the experts, and which layers have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.base import fields_of, layer_count, read_activation, read_size
from kvgen.families.family import NameTable
from kvgen.families.fields import Fields
from kvgen.model.ffns import MLP, Combination, MoE, Router, Scores


def expert_names(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> NameTable:
    """Return transformers' tensor names, which begin with `prefix`: one tensor for each expert, or all in one."""
    return {
        f"{prefix}.{{j}}.{gate}": "blk.{i}.ffn.experts.gate",
        f"{prefix}.{{j}}.{up}": "blk.{i}.ffn.experts.up",
        f"{prefix}.{{j}}.{down}": "blk.{i}.ffn.experts.down",
        f"{prefix}.gate_up_proj": "blk.{i}.ffn.experts.gate_up.weight",
        f"{prefix}.down_proj": "blk.{i}.ffn.experts.down.weight",
    }


HF_EXPERT_NAMES: NameTable = {
    "model.layers.{i}.mlp.gate": "blk.{i}.ffn.router",
    "model.layers.{i}.mlp.gate.e_score_correction_bias": "blk.{i}.ffn.router.selection.bias",
    **expert_names("model.layers.{i}.mlp.experts"),
    "model.layers.{i}.mlp.shared_experts.gate_proj": "blk.{i}.ffn.shared.gate",
    "model.layers.{i}.mlp.shared_experts.up_proj": "blk.{i}.ffn.shared.up",
    "model.layers.{i}.mlp.shared_experts.down_proj": "blk.{i}.ffn.shared.down",
    "model.layers.{i}.mlp.shared_expert.gate_proj": "blk.{i}.ffn.shared.gate",
    "model.layers.{i}.mlp.shared_expert.up_proj": "blk.{i}.ffn.shared.up",
    "model.layers.{i}.mlp.shared_expert.down_proj": "blk.{i}.ffn.shared.down",
    "model.layers.{i}.mlp.shared_expert_gate": "blk.{i}.ffn.shared_gate",
}
"""Tensor names that most mixtures of experts share in transformers."""

SHARED_EXPERT = frozenset({"ffn.shared.gate", "ffn.shared.up", "ffn.shared.down"})

_GATING: dict[int, Scores] = {1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen"}  # llama.cpp's numbers


def hf_ffns(
    raw: RawCheckpoint,
    router: Router,
    *,
    width: str = "moe_intermediate_size",
    shared: int = 0,
    shared_gate: bool = False,
    gated: bool = True,
    activation: Combination | None = None,
    sparse: Callable[[int], bool] = lambda layer: True,
) -> list[MLP | MoE]:
    """Return the feed-forward layer of each layer.

    width: the field that has the width of an expert. shared: the width of the shared expert; 0 if there is none.
    gated: all MLPs. activation: `hidden_act` if it is None. sparse: whether layer i is a mixture; the others are dense.
    """
    fields = fields_of(raw)
    expert = MLP(fields.count(width), gated, activation or read_activation(fields, "hidden_act"))
    return _ffns(raw, router, expert, shared=shared, shared_gate=shared_gate, sparse=sparse)


def gguf_ffns(
    raw: RawCheckpoint,
    *,
    scores: Scores = "softmax",
    normalize: bool,
    shared: int = 0,
    shared_gate: bool = False,
    selection_bias: bool = False,
    gated: bool = True,
    activation: Combination = "silu",
) -> list[MLP | MoE]:
    """Read the feed-forward layer of each layer from GGUF keys; the arguments are what llama.cpp has fixed in code.

    scores, normalize: if the file does not say otherwise.
    """
    keys = fields_of(raw)
    gating = keys.get("expert_gating_func") or 0
    if type(gating) is not int or gating not in (0, *_GATING):
        raise UnsupportedError(f"{raw.path}: {keys.prefix}expert_gating_func {gating!r:.80} is not supported")
    router = Router(
        experts=keys.count("expert_count"),
        active=keys.count("expert_used_count"),
        scores=_GATING.get(gating, scores),
        normalize=keys.flag("expert_weights_norm", normalize),
        scale=keys.number("expert_weights_scale", 1.0),
        selection_bias=selection_bias,
        groups=keys.count("expert_group_count", 1),
        active_groups=keys.count("expert_group_used_count", 1),
        group_top=1 if _GATING.get(gating, scores) == "softmax" else 2,  # DeepSeek-V2, and V3
    )
    width = keys.count("expert_feed_forward_length", keys.optional_count("feed_forward_length"))
    expert = MLP(width, gated, activation)
    first, step = keys.whole("leading_dense_block_count", 0), keys.count("interleave_moe_layer_step", 1)

    def sparse(layer: int) -> bool:
        return layer >= first and (layer + 1) % step == 0

    return _ffns(raw, router, expert, shared=shared, shared_gate=shared_gate, sparse=sparse)


def _ffns(
    raw: RawCheckpoint,
    router: Router,
    expert: MLP,
    *,
    shared: int,
    shared_gate: bool,
    sparse: Callable[[int], bool],
) -> list[MLP | MoE]:
    check_router(router, fields_of(raw).path)
    shared_expert = replace(expert, width=shared) if shared else None
    mixture = MoE(router, expert, shared_expert, shared_gate)
    kinds = [sparse(layer) for layer in range(layer_count(raw))]
    if all(kinds):
        return [mixture] * len(kinds)
    dense = replace(expert, width=read_size(raw, "ffn_width"))
    return [mixture if is_sparse else dense for is_sparse in kinds]


def check_router(router: Router, path: Path) -> None:
    if router.experts % router.groups or router.active_groups > router.groups:
        raise CheckpointError(
            f"{path}: cannot choose {router.active_groups} of {router.groups} groups of {router.experts} experts"
        )
    size = router.experts // router.groups
    if router.active > size * router.active_groups:
        raise CheckpointError(f"{path}: cannot choose {router.active} of {size * router.active_groups} experts")
    if router.active_groups < router.groups and router.group_top > size:
        raise CheckpointError(f"{path}: groups of {size} experts are too small to be chosen")


def after_first(fields: Fields, name: str) -> Callable[[int], bool]:
    """Return whether a layer is a mixture, where the first ones, as many as the field `name` says, are dense."""
    first = fields.whole(name, 0)
    return lambda layer: layer >= first


def as_vector(tensor: Tensor) -> Tensor:
    """Return a matrix of one row as a vector."""
    return tensor.flatten()


def as_row(tensor: Tensor) -> Tensor:
    """Return a vector as a matrix of one row: llama.cpp stores the gate of a shared expert as a vector."""
    return tensor.view(1, -1)
