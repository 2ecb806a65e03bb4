"""Jamba: Mamba in most layers, attention without positions in the others, mixtures of experts in some."""

from __future__ import annotations

import math

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.bamba import HF_NAMES_AROUND_MAMBA
from kvgen.families.base import fields_of, gguf_config, hf_config, layer_count, read_size
from kvgen.families.experts import expert_names, gguf_ffns, hf_ffns
from kvgen.families.family import GGUF_NAMES, Family, NameTable
from kvgen.families.fields import Fields
from kvgen.families.hybrids import hf_mamba2_biases, hf_mamba2_transforms, read_sizes, with_recurrences
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE, Router
from kvgen.model.mixers import Mamba

_HF_NAMES: NameTable = {
    **HF_NAMES_AROUND_MAMBA,
    "model.layers.{i}.feed_forward.router": "blk.{i}.ffn.router",
    **expert_names("model.layers.{i}.feed_forward.experts"),
    "model.layers.{i}.mamba.in_proj": "blk.{i}.attn.in_proj",
    "model.layers.{i}.mamba.conv1d": "blk.{i}.attn.conv",
    "model.layers.{i}.mamba.x_proj": "blk.{i}.attn.x_proj",
    "model.layers.{i}.mamba.dt_proj": "blk.{i}.attn.dt_proj",
    "model.layers.{i}.mamba.dt_layernorm": "blk.{i}.attn.dt_norm",
    "model.layers.{i}.mamba.b_layernorm": "blk.{i}.attn.b_norm",
    "model.layers.{i}.mamba.c_layernorm": "blk.{i}.attn.c_norm",
    "model.layers.{i}.mamba.A_log": "blk.{i}.attn.A.weight",
    "model.layers.{i}.mamba.D": "blk.{i}.attn.D.weight",
    "model.layers.{i}.mamba.out_proj": "blk.{i}.attn.out_proj",
}
_GGUF_NAMES: NameTable = {
    **GGUF_NAMES,
    "blk.{i}.ssm_in": "blk.{i}.attn.in_proj",
    "blk.{i}.ssm_conv1d": "blk.{i}.attn.conv",
    "blk.{i}.ssm_x": "blk.{i}.attn.x_proj",
    "blk.{i}.ssm_dt": "blk.{i}.attn.dt_proj",
    "blk.{i}.ssm_dt_norm": "blk.{i}.attn.dt_norm",
    "blk.{i}.ssm_b_norm": "blk.{i}.attn.b_norm",
    "blk.{i}.ssm_c_norm": "blk.{i}.attn.c_norm",
    "blk.{i}.ssm_a": "blk.{i}.attn.A.weight",
    "blk.{i}.ssm_d": "blk.{i}.attn.D.weight",
    "blk.{i}.ssm_out": "blk.{i}.attn.out_proj",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        return _read_gguf(raw, fields)
    fields.require("hidden_act", "silu")
    fields.require("mamba_inner_layernorms", True)
    fields.require("sliding_window", None)
    dim = read_size(raw, "dim")
    is_auto = fields.get("mamba_dt_rank") in (None, "auto")
    mixer = Mamba(
        inner=fields.count("mamba_expand", 2) * dim,
        size=fields.count("mamba_d_state", 16),
        width=fields.count("mamba_d_conv", 4),
        rank=math.ceil(dim / 16) if is_auto else fields.count("mamba_dt_rank"),
    )
    biases, ffns = hf_mamba2_biases(fields), _hf_ffns(raw, fields)
    config = hf_config(raw, names=_HF_NAMES, rotaries=None, ffns=ffns, biases=biases)
    return with_recurrences(config, mixer, _recurring(fields, "attn_layer", 8, 4, layer_count(raw)))


def _recurring(fields: Fields, name: str, period: int, offset: int, count: int) -> list[bool]:
    """Return whether each layer is of a kind that recurs. period, offset: defaults."""
    period, offset = fields.count(f"{name}_period", period), fields.whole(f"{name}_offset", offset)
    if offset >= period:
        raise CheckpointError(f"{fields.path}: {name}_offset is {offset}; it must be smaller than {name}_period")
    return [layer % period == offset for layer in range(count)]


def _hf_ffns(raw: RawCheckpoint, fields: Fields) -> list[MLP | MoE]:
    count, experts = layer_count(raw), fields.count("num_experts", 16)
    if experts == 1:
        return [MLP(read_size(raw, "ffn_width"))] * count
    kinds = _recurring(fields, "expert_layer", 2, 1, count)
    router = Router(experts, fields.count("num_experts_per_tok", 2))
    return hf_ffns(raw, router, width="intermediate_size", sparse=kinds.__getitem__)


def _read_gguf(raw: RawCheckpoint, keys: Fields) -> DecoderConfig:
    """A layer without key-value heads is Mamba; one without a router is dense."""
    raw, attends = read_sizes(raw, "attention.head_count_kv")
    mixer = Mamba(
        inner=keys.count("ssm.inner_size"),
        size=keys.count("ssm.state_size"),
        width=keys.count("ssm.conv_kernel"),
        rank=keys.count("ssm.time_step_rank"),
    )
    routed = [f"blk.{layer}.ffn_gate_inp.weight" in raw.tensors for layer in range(layer_count(raw))]
    dense = MLP(read_size(raw, "ffn_width"))
    mixtures = gguf_ffns(raw, normalize=False) if any(routed) else [dense] * len(routed)
    ffns = [mixture if is_routed else dense for mixture, is_routed in zip(mixtures, routed, strict=True)]
    return with_recurrences(gguf_config(raw, names=_GGUF_NAMES, rotaries=None, ffns=ffns), mixer, attends)


FAMILY = Family("jamba", "jamba", read_config, _HF_NAMES, gguf_names=_GGUF_NAMES, hf_transforms=hf_mamba2_transforms)
