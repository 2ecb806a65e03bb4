"""Gemma 1: embeddings scaled by sqrt(dim), norms that multiply by 1 + w, a GELU gate, a tied head."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, flagged_biases, gguf_config, gguf_fields, hf_config, hf_fields
from kvgen.families.family import Family, Transform, plus_one
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, **gguf_mechanisms(raw))
    fields = hf_fields(raw)
    fields.require("use_bidirectional_attention", False)
    # config.json files of this generation name the exact GELU and mean the approximation (transformers says so).
    return hf_config(raw, tied_head=True, activation="gelu_tanh", **hf_mechanisms(raw))


def hf_mechanisms(raw: RawCheckpoint) -> dict[str, Any]:
    """What all generations share, from config.json."""
    fields = hf_fields(raw)
    return {
        "embedding_scale": fields.count("hidden_size") ** 0.5,
        "biases": flagged_biases(fields),
    }


def gguf_mechanisms(raw: RawCheckpoint) -> dict[str, Any]:
    """The same from a GGUF file, where llama.cpp has added the 1 to the norms."""
    return {"activation": "gelu_tanh", "embedding_scale": gguf_fields(raw).count("embedding_length") ** 0.5}


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    names = config.norms | {"output_norm"} | ({"attn.q_norm", "attn.k_norm"} if config.attention.qk_norm else set())
    return dict.fromkeys(names, plus_one)


FAMILY = Family("gemma", "gemma", read_config, HF_NAMES, hf_transforms=hf_transforms)
