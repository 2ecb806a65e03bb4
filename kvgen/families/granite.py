"""Granite 3, dense: Llama with multipliers on embeddings, attention, residuals and logits."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.family import Family
from kvgen.families.hybrids import read_sizes
from kvgen.families.llama import gguf_transforms
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        raw, _ = read_sizes(raw, "attention.head_count_kv")  # one for each layer if it is a Granite 4
        return gguf_config(raw, scaled_attention=True, **read_scales(raw))
    return hf_config(raw, biases=flagged_biases(raw), **read_scales(raw))


def read_scales(raw: RawCheckpoint) -> dict[str, Any]:
    """Return the multipliers, as mechanisms of a config."""
    fields = fields_of(raw)
    if raw.format == "gguf":
        return {
            "attention": {"scale": fields.optional_number("attention.scale")},
            "embedding_scale": fields.number("embedding_scale", 1.0),
            "residual_scale": fields.number("residual_scale", 1.0),
            "logit_scale": 1 / fields.number("logit_scale", 1.0),
        }
    return {
        "attention": {"scale": fields.number("attention_multiplier", 1.0)},
        "embedding_scale": fields.number("embedding_multiplier", 1.0),
        "residual_scale": fields.number("residual_multiplier", 1.0),
        "logit_scale": 1 / fields.number("logits_scaling", 1.0),
    }


FAMILY = Family("granite", "granite", read_config, HF_NAMES, gguf_transforms=gguf_transforms)
