"""Phi 3, 3.5 and 4: Llama with fused projections, a window, and LongRoPE for the long-context ones."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import (
    HF_NAMES,
    gguf_config,
    gguf_fields,
    gguf_layers,
    hf_config,
    hf_fields,
    hf_head_dim,
    hf_layers,
)
from kvgen.families.family import GGUF_NAMES, Family
from kvgen.families.fields import Fields
from kvgen.families.rope import rotary_from_hf
from kvgen.model.config import DecoderConfig, Rotary

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.self_attn.qkv_proj": "blk.{i}.attn.qkv",
    "model.layers.{i}.mlp.gate_up_proj": "blk.{i}.ffn.gate_up",
}
_GGUF_NAMES = {**GGUF_NAMES, "blk.{i}.ffn_up": "blk.{i}.ffn.gate_up"}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        keys = gguf_fields(raw)
        window = keys.count("attention.sliding_window") if keys.get("attention.sliding_window") else None  # 0 is none
        return gguf_config(raw, names=_GGUF_NAMES, windows=[window] * gguf_layers(raw))
    fields = hf_fields(raw)
    layers = hf_layers(raw)
    return hf_config(
        raw,
        names=_HF_NAMES,
        rotaries=[_rotary(raw)] * layers,
        windows=[fields.optional_count("sliding_window")] * layers,
    )


def _rotary(raw: RawCheckpoint) -> Rotary:
    """The first releases call LongRoPE `su` or `yarn`."""
    fields = hf_fields(raw)
    section = next((name for name in ("rope_parameters", "rope_scaling") if fields.get(name)), None)
    if section is not None and (values := fields.section(section)) is not None:
        kind = values.get("rope_type") or values.get("type")
        renamed = {**values.values, "rope_type": "longrope" if kind in ("su", "yarn") else kind}
        fields = Fields({**fields.values, section: renamed}, fields.path)
    return rotary_from_hf(fields, hf_head_dim(fields), default_share=fields.number("partial_rotary_factor", 1.0))


FAMILY = Family("phi3", "phi3", read_config, _HF_NAMES, _GGUF_NAMES)
