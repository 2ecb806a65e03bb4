"""Granite 4: Mamba 2 in most layers, attention in the others, rotated or not; Granite's multipliers; dense or experts.

llama.cpp gives the same architecture to Bamba.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import UnsupportedError
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, gguf_config, hf_config, layer_count
from kvgen.families.experts import gguf_ffns, hf_ffns
from kvgen.families.family import GGUF_NAMES, Family, Transforms
from kvgen.families.fields import Fields
from kvgen.families.granite import read_scales
from kvgen.families.granitemoe import EXPERT_NAMES
from kvgen.families.hybrids import (
    ATTENDS,
    gguf_mamba2_names,
    gguf_mamba2_transforms,
    hf_mamba2_biases,
    hf_mamba2_transforms,
    mamba2_names,
    read_gguf_mamba2,
    read_hf_mamba2,
    read_layer_kinds,
    read_sizes,
    with_recurrences,
)
from kvgen.families.llama import gguf_transforms
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE, Router

_HF_NAMES = {
    **HF_NAMES,
    **EXPERT_NAMES,
    **mamba2_names("model.layers.{i}.mamba"),
    "model.layers.{i}.shared_mlp.input_linear": "blk.{i}.ffn.shared.gate_up",
    "model.layers.{i}.shared_mlp.output_linear": "blk.{i}.ffn.shared.down",
}
_DENSE_HF_NAMES = {
    **_HF_NAMES,
    "model.layers.{i}.shared_mlp.input_linear": "blk.{i}.ffn.gate_up",
    "model.layers.{i}.shared_mlp.output_linear": "blk.{i}.ffn.down",
}
_GGUF_NAMES = {**GGUF_NAMES, **gguf_mamba2_names()}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        return _read_gguf(raw, fields)
    fields.require("hidden_act", "silu")
    default = ["linear_attention"] * layer_count(raw)
    kinds = read_layer_kinds(fields, len(default), ATTENDS, default)
    attends = [ATTENDS[kind] for kind in kinds]
    mechanisms: dict[str, Any] = {**read_scales(raw), "ffns": _hf_ffns(raw, fields), "biases": flagged_biases(raw)}
    if not _is_rotated(fields):
        mechanisms["rotaries"] = None
    if all(attends):
        return hf_config(raw, names=_HF_NAMES, **mechanisms)
    mechanisms["biases"] |= hf_mamba2_biases(fields)
    return with_recurrences(hf_config(raw, names=_HF_NAMES, **mechanisms), read_hf_mamba2(raw), attends)


def _is_rotated(fields: Fields) -> bool:
    kind = fields.get("position_embedding_type")
    if kind not in (None, "nope", "rope"):
        raise UnsupportedError(f"{fields.path}: position_embedding_type is {kind!r:.80}; kvgen supports 'rope', 'nope'")
    return bool(kind == "rope")


def _hf_ffns(raw: RawCheckpoint, fields: Fields) -> list[MLP | MoE]:
    shared = fields.count("shared_intermediate_size", 1024)
    if _is_dense(raw):
        return [MLP(shared)] * layer_count(raw)
    router = Router(
        fields.count("num_local_experts", 8), fields.count("num_experts_per_tok", 2), scores="softmax_of_chosen"
    )
    return hf_ffns(raw, router, width="intermediate_size", shared=shared)


def _is_dense(raw: RawCheckpoint) -> bool:
    return raw.format == "hf" and fields_of(raw).whole("num_local_experts", 8) == 0


def _read_gguf(raw: RawCheckpoint, keys: Fields) -> DecoderConfig:
    raw, attends = read_sizes(raw, "attention.head_count_kv")
    mechanisms: dict[str, Any] = {**read_scales(raw), "scaled_attention": True}
    if keys.get("expert_count"):
        shared = keys.whole("expert_shared_feed_forward_length", 0)
        mechanisms["ffns"] = gguf_ffns(raw, normalize=True, shared=shared)
    if not keys.flag("rope.scaling.finetuned", True):  # llama.cpp uses this key to say so
        mechanisms["rotaries"] = None
    return with_recurrences(gguf_config(raw, names=_GGUF_NAMES, **mechanisms), read_gguf_mamba2(raw), attends)


def _dense(raw: RawCheckpoint) -> Family | None:
    return replace(FAMILY, hf_names=_DENSE_HF_NAMES) if _is_dense(raw) else None


def _gguf_transforms(config: DecoderConfig) -> Transforms:
    rotations = gguf_transforms(config) if config.attentions else {}
    return {**gguf_mamba2_transforms(config), **rotations}


FAMILY = Family(
    "granitemoehybrid",
    "granitehybrid",
    read_config,
    _HF_NAMES,
    gguf_names=_GGUF_NAMES,
    hf_transforms=hf_mamba2_transforms,
    gguf_transforms=_gguf_transforms,
    variant=_dense,
)
