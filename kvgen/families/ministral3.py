"""Ministral 3 and the text part of Mistral 3: Llama, whose queries grow with their position in Ministral 3."""

from __future__ import annotations

from dataclasses import replace

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, gguf_config, head_dim, hf_config
from kvgen.families.family import Family
from kvgen.families.fields import Fields
from kvgen.families.llama import gguf_transforms
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf, yarn_scale
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import Rotary


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        rotary = _gguf_rotary(raw)
        queries = _growing(rotary, fields, "attention.temperature_scale", "rope.scaling.original_context_length")
        return gguf_config(raw, rotaries=rotary, attention={"query_rotary": queries})
    rotary = rotary_from_hf(fields, head_dim(raw))
    rope = fields.section("rope_parameters") or Fields({}, fields.path)
    queries = _growing(rotary, rope, "llama_4_scaling_beta", "original_max_position_embeddings")
    windows = fields.optional_count("sliding_window")
    return hf_config(raw, windows=windows, rotaries=rotary, attention={"query_rotary": queries})


def _gguf_rotary(raw: RawCheckpoint) -> Rotary:
    """Read the rotary. llama.cpp divides YaRN's attention factor by that of `yarn_log_multiplier`."""
    keys = fields_of(raw)
    rotary = rotary_from_gguf(raw, keys, head_dim(raw))
    mscale = keys.optional_number("rope.scaling.yarn_log_multiplier")
    if mscale is None:
        return rotary
    return replace(rotary, scale=rotary.scale / yarn_scale(keys.number("rope.scaling.factor"), mscale))


def _growing(rotary: Rotary, fields: Fields, growth: str, length: str) -> Rotary | None:
    """Return the rotary of queries, if they grow (transformers' `get_llama_4_attn_scale`). growth, length: fields."""
    if fields.get(growth) is None:
        return None
    return replace(rotary, growth=fields.number(growth), growth_length=fields.count(length))


FAMILY = Family("ministral3", "mistral3", read_config, HF_NAMES, gguf_transforms=gguf_transforms)
