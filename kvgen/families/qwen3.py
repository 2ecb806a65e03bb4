"""Qwen3, dense: a norm on each head's queries and keys instead of Qwen2's biases."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, HF_QK_NORM_NAMES, flagged_biases, gguf_config, hf_config
from kvgen.families.family import Family
from kvgen.families.qwen2 import read_windows
from kvgen.model.config import DecoderConfig

_HF_NAMES = {**HF_NAMES, **HF_QK_NORM_NAMES}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, attention={"qk_norm": "head"})
    windows, biases = read_windows(raw), flagged_biases(raw)
    return hf_config(raw, names=_HF_NAMES, windows=windows, attention={"qk_norm": "head"}, biases=biases)


FAMILY = Family("qwen3", "qwen3", read_config, _HF_NAMES)
