"""Qwen3-Next: gated delta nets in three layers of four, attention with a gate on its output, mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import HF_NAMES, HF_QK_NORM_NAMES, fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.experts import HF_EXPERT_NAMES, as_row, gguf_ffns, hf_ffns
from kvgen.families.family import GGUF_NORM_NAMES, Family, Transforms, by_part, plus_one, predicts_ahead
from kvgen.families.fields import Fields
from kvgen.families.hybrids import ATTENDS, hf_mamba2_transforms, read_gguf_heads, read_layer_kinds, with_recurrences
from kvgen.families.qwen3_moe import is_sparse, read_router
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE
from kvgen.model.mixers import DeltaNet

HF_NAMES_WITH_DELTA_NETS = {
    **HF_NAMES,
    **HF_EXPERT_NAMES,
    **HF_QK_NORM_NAMES,
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn.q_gate",
    "model.layers.{i}.linear_attn.in_proj_qkvz": "blk.{i}.attn.in_proj_gate",
    "model.layers.{i}.linear_attn.in_proj_ba": "blk.{i}.attn.ba",
    "model.layers.{i}.linear_attn.in_proj_qkv": "blk.{i}.attn.in_proj",
    "model.layers.{i}.linear_attn.in_proj_z": "blk.{i}.attn.gate",
    "model.layers.{i}.linear_attn.in_proj_b": "blk.{i}.attn.b",
    "model.layers.{i}.linear_attn.in_proj_a": "blk.{i}.attn.a",
    "model.layers.{i}.linear_attn.conv1d": "blk.{i}.attn.conv",
    "model.layers.{i}.linear_attn.dt_bias": "blk.{i}.attn.dt.weight",
    "model.layers.{i}.linear_attn.A_log": "blk.{i}.attn.A.weight",
    "model.layers.{i}.linear_attn.norm": "blk.{i}.attn.norm",
    "model.layers.{i}.linear_attn.out_proj": "blk.{i}.attn.out_proj",
}
GGUF_NAMES_WITH_DELTA_NETS = {
    **GGUF_NORM_NAMES,
    "blk.{i}.attn_q": "blk.{i}.attn.q_gate",
    "blk.{i}.attn_qkv": "blk.{i}.attn.in_proj",
    "blk.{i}.attn_gate": "blk.{i}.attn.gate",
    "blk.{i}.ssm_in": "blk.{i}.attn.in_proj_gate",  # of files before `attn_qkv` and `attn_gate`, in transformers' order
    "blk.{i}.ssm_ba": "blk.{i}.attn.ba",
    "blk.{i}.ssm_beta": "blk.{i}.attn.b",
    "blk.{i}.ssm_alpha": "blk.{i}.attn.a",
    "blk.{i}.ssm_conv1d": "blk.{i}.attn.conv",
    "blk.{i}.ssm_dt.bias": "blk.{i}.attn.dt.weight",
    "blk.{i}.ssm_a": "blk.{i}.attn.A.weight",
    "blk.{i}.ssm_norm": "blk.{i}.attn.norm",
    "blk.{i}.ssm_out": "blk.{i}.attn.out_proj",
}
_INTERVAL = 4  # every fourth layer is attention
_CENTRED_NORMS = ("attn_norm", "ffn_norm", "output_norm", "attn.q_norm", "attn.k_norm")  # not the delta net's own


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        return read_hybrid(raw, read_gguf_ffns(raw))
    router = replace(read_router(fields), normalize=fields.flag("norm_topk_prob", True))
    shared = fields.count("shared_expert_intermediate_size")
    return read_hybrid(raw, hf_ffns(raw, router, shared=shared, shared_gate=True, sparse=is_sparse(fields)))


def read_gguf_ffns(raw: RawCheckpoint) -> list[MLP | MoE]:
    shared = fields_of(raw).count("expert_shared_feed_forward_length")
    return gguf_ffns(raw, normalize=True, shared=shared, shared_gate=True)


def read_hybrid(raw: RawCheckpoint, ffns: Sequence[MLP | MoE] | None = None) -> DecoderConfig:
    """Read a config of delta nets and attention. ffns: the feed-forward layer of each layer; None for MLPs."""
    fields = fields_of(raw)
    shared: dict[str, Any] = {"attention": {"qk_norm": "head", "output_gate": True}, "ffns": ffns}
    if raw.format == "gguf":
        config = gguf_config(raw, names=GGUF_NAMES_WITH_DELTA_NETS, **shared)
        net = _read_gguf_net(fields)
    else:
        fields.require("hidden_act", "silu")
        fields.require("attn_output_gate", True)
        biases, names = flagged_biases(raw), HF_NAMES_WITH_DELTA_NETS
        config = hf_config(raw, names=names, rotary_share=0.25, activation="silu", biases=biases, **shared)
        net = _read_hf_net(fields)
    if net.heads % net.key_heads:
        raise CheckpointError(f"{fields.path}: {net.heads} heads of values cannot share {net.key_heads} heads of keys")
    return with_recurrences(config, net, _attends(fields, len(config.layers)))


def _read_hf_net(fields: Fields) -> DeltaNet:
    return DeltaNet(
        heads=fields.count("linear_num_value_heads"),
        value_dim=fields.count("linear_value_head_dim"),
        key_heads=fields.count("linear_num_key_heads"),
        key_dim=fields.count("linear_key_head_dim"),
        width=fields.count("linear_conv_kernel_dim"),
    )


def _read_gguf_net(keys: Fields) -> DeltaNet:
    heads, value_dim = read_gguf_heads(keys)
    return DeltaNet(
        heads=heads,
        value_dim=value_dim,
        key_heads=keys.count("ssm.group_count"),
        key_dim=keys.count("ssm.state_size"),
        width=keys.count("ssm.conv_kernel"),
    )


def _attends(fields: Fields, count: int) -> list[bool]:
    """Return whether a layer is attention, for each."""
    name = "attention.recurrent_layers"  # of GGUF files; layers that predict further tokens follow
    recurrent = fields.get(name)
    if isinstance(recurrent, list) and len(recurrent) >= count and all(type(flag) is bool for flag in recurrent):
        return [not flag for flag in recurrent[:count]]
    if recurrent is not None:
        raise CheckpointError(f"{fields.path}: {fields.prefix}{name} must have true or false for each layer")
    if fields.get("layer_types") is None:
        interval = fields.count("full_attention_interval", _INTERVAL)
        return [(layer + 1) % interval == 0 for layer in range(count)]
    kinds = read_layer_kinds(fields, count, ("linear_attention", "full_attention"))
    return [ATTENDS[kind] for kind in kinds]


def hf_transforms(config: DecoderConfig) -> Transforms:
    """Norms multiply by 1 + w; decay rates and convolutions are stored as those of Mamba 2."""
    return {**dict.fromkeys(_CENTRED_NORMS, plus_one), **_ungrouped(config), **hf_mamba2_transforms(config)}


def gguf_transforms(config: DecoderConfig) -> Transforms:
    """llama.cpp's converter has applied the others."""
    return {**_ungrouped(config), "ffn.shared_gate": as_row}


def _ungrouped(config: DecoderConfig) -> Transforms:
    """Projections that are stored head by head: of queries and gate, of all that a head of keys has its part in."""
    transforms = {}
    for attention in config.attentions:
        transforms["attn.q_gate"] = partial(by_part, groups=attention.heads, sizes=[attention.head_dim] * 2)
    for net in delta_nets(config):
        share = net.heads // net.key_heads
        sizes = [net.key_dim] * 2 + [share * net.value_dim] * 2
        transforms["attn.in_proj_gate"] = partial(by_part, groups=net.key_heads, sizes=sizes)
        transforms["attn.ba"] = partial(by_part, groups=net.key_heads, sizes=[share] * 2)
    return transforms


def delta_nets(config: DecoderConfig) -> list[DeltaNet]:
    """Return the distinct delta nets of all layers: one, or none."""
    return list(dict.fromkeys(mixer for mixer in config.recurrences if isinstance(mixer, DeltaNet)))


FAMILY = Family(
    "qwen3_next",
    "qwen3next",
    read_config,
    HF_NAMES_WITH_DELTA_NETS,
    gguf_names=GGUF_NAMES_WITH_DELTA_NETS,
    hf_transforms=hf_transforms,
    gguf_transforms=gguf_transforms,
    ignores=predicts_ahead,
)
