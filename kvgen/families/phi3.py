"""Phi 3, 3.5 and 4: Llama with fused projections, a window, and LongRoPE in the long-context models."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, gguf_config, head_dim, hf_config
from kvgen.families.family import GGUF_NAMES, Family
from kvgen.families.fields import Fields
from kvgen.families.rope import rotary_from_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import Rotary

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.self_attn.qkv_proj": "blk.{i}.attn.qkv",
    "model.layers.{i}.mlp.gate_up_proj": "blk.{i}.ffn.gate_up",
}
_GGUF_NAMES = {**GGUF_NAMES, "blk.{i}.ffn_up": "blk.{i}.ffn.gate_up"}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        window = "attention.sliding_window"
        windows = fields.count(window) if fields.get(window) else None  # 0 means none
        return gguf_config(raw, names=_GGUF_NAMES, windows=windows)
    windows = fields.optional_count("sliding_window")
    return hf_config(raw, names=_HF_NAMES, rotaries=_read_rotary(raw), windows=windows)


def _read_rotary(raw: RawCheckpoint) -> Rotary:
    """Read the rotary; the first releases call LongRoPE `su` or `yarn`."""
    fields = fields_of(raw)
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    section = fields.section(name)
    if section is not None:
        kind = section.get("rope_type") or section.get("type")
        renamed = {**section.values, "rope_type": "longrope" if kind in ("su", "yarn") else kind}
        fields = Fields({**fields.values, name: renamed}, fields.path)
    return rotary_from_hf(fields, head_dim(raw), default_share=fields.number("partial_rotary_factor", 1.0))


FAMILY = Family("phi3", "phi3", read_config, _HF_NAMES, _GGUF_NAMES)
