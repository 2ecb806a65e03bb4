"""Mistral: Llama with a sliding window in every layer. GGUF files call it `llama` and drop the window."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, hf_config
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return hf_config(raw, windows=fields_of(raw).optional_count("sliding_window"))


FAMILY = Family("mistral", "", read_config, HF_NAMES)
