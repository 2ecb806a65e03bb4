"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and optional windows in the upper layers."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, QKV, fields_of, gguf_config, hf_config, sliding_windows
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, biases=QKV)
    return hf_config(raw, windows=read_windows(raw), biases=QKV)


def read_windows(raw: RawCheckpoint) -> list[int | None] | None:
    """With `use_sliding_window`, layers from `max_window_layers` on have a window."""
    fields = fields_of(raw)
    if not fields.flag("use_sliding_window", False) or fields.get("sliding_window") is None:
        return None
    first = 0 if fields.get("max_window_layers") == 0 else fields.count("max_window_layers", 28)
    return sliding_windows(raw, lambda layer: layer >= first)


FAMILY = Family("qwen2", "qwen2", read_config, HF_NAMES)
