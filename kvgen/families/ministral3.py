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
        config = gguf_config(raw, rotaries=_gguf_rotary(raw))
        beta, name = fields.optional_number("attention.temperature_scale"), "rope.scaling.original_context_length"
    else:
        windows = fields.optional_count("sliding_window")
        rotary = rotary_from_hf(fields, head_dim(raw))
        config = hf_config(raw, windows=windows, rotaries=rotary)
        fields = fields.section("rope_parameters") or Fields({}, fields.path)
        beta, name = fields.optional_number("llama_4_scaling_beta"), "original_max_position_embeddings"
    return config if beta is None else _with_growth(config, beta, fields.count(name))


def _gguf_rotary(raw: RawCheckpoint) -> Rotary:
    """Read the rotary. llama.cpp divides YaRN's attention factor by that of `yarn_log_multiplier`."""
    keys = fields_of(raw)
    rotary = rotary_from_gguf(raw, keys, head_dim(raw))
    mscale = keys.optional_number("rope.scaling.yarn_log_multiplier")
    if mscale is None:
        return rotary
    return replace(rotary, scale=rotary.scale / yarn_scale(keys.number("rope.scaling.factor"), mscale))


def _with_growth(config: DecoderConfig, growth: float, length: int) -> DecoderConfig:
    """Scale queries by 1 + growth * ln(1 + floor(position / length)), transformers' `get_llama_4_attn_scale`."""
    rotary = replace(config.rotaries[0], growth=growth, growth_length=length)
    mixer = replace(config.attention, query_rotary=rotary)  # all layers are alike
    return replace(config, layers=tuple(replace(layer, mixer=mixer) for layer in config.layers))


FAMILY = Family("ministral3", "mistral3", read_config, HF_NAMES, gguf_transforms=gguf_transforms)
