"""Mistral: Llama with a sliding window in every layer. llama.cpp writes it as `llama`, without the window."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, hf_config, hf_fields, hf_layers
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = hf_fields(raw)
    return hf_config(raw, windows=[fields.optional_count("sliding_window")] * hf_layers(raw))


FAMILY = Family("mistral", "", read_config, HF_NAMES)
