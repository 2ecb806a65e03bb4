"""Nemotron and Minitron: layer norms that multiply by 1 + w, half of each head rotated, an MLP of squared ReLUs."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, BLOCK_NORMS, HF_NAMES, PLAIN_MLP, fields_of, gguf_config, hf_config
from kvgen.families.family import Family, Transform, plus_one
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    mechanisms: dict[str, Any] = {"norm": "layer", "gated": False}
    if raw.format == "gguf":
        return gguf_config(raw, **mechanisms, activation="relu2", biases=BLOCK_NORMS)
    fields, biases = fields_of(raw), BLOCK_NORMS
    if fields.flag("attention_bias", False):
        biases |= ATTENTION
    if fields.flag("mlp_bias", False):
        biases |= PLAIN_MLP
    return hf_config(raw, **mechanisms, eps="norm_eps", rotary_share=0.5, biases=biases)


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    """llama.cpp's converter has already added the 1. Biases stay as they are."""
    return dict.fromkeys((f"{norm}.weight" for norm in BLOCK_NORMS), plus_one)


FAMILY = Family("nemotron", "nemotron", read_config, HF_NAMES, hf_transforms=hf_transforms)
