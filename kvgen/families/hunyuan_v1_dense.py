"""Hunyuan, dense: Llama with a norm on each head after rotation."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, gguf_config, head_dim, hf_config
from kvgen.families.family import Family
from kvgen.families.fields import Fields
from kvgen.families.rope import rotary_from_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import Rotary

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.self_attn.query_layernorm": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.key_layernorm": "blk.{i}.attn.k_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, attention={"qk_norm": "rotated-head"})
    rotary, biases = _read_rotary(raw), flagged_biases(raw)
    return hf_config(raw, names=_HF_NAMES, rotaries=rotary, attention={"qk_norm": "rotated-head"}, biases=biases)


def _read_rotary(raw: RawCheckpoint) -> Rotary:
    """Read the rotary. With `alpha`, the type `dynamic` stands for a larger base that no longer changes.

    NTK-aware scaling: base * alpha^(D / (D - 2)), in transformers' modeling_hunyuan_v1_dense.
    """
    fields, size = fields_of(raw), head_dim(raw)
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    section = fields.section(name)
    if section is None or not section.get("alpha") or (section.get("rope_type") or section.get("type")) != "dynamic":
        return rotary_from_hf(fields, size)
    base = section.number("rope_theta", fields.number("rope_theta", 10000.0))
    scaled = {"rope_type": "default", "rope_theta": base * section.number("alpha") ** (size / (size - 2))}
    return rotary_from_hf(Fields({**fields.values, name: scaled}, fields.path), size)


FAMILY = Family("hunyuan_v1_dense", "hunyuan-dense", read_config, _HF_NAMES)
