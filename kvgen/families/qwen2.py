"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and at times a window in the upper layers."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, gguf_config, hf_config, hf_fields, hf_layers, sliding_windows
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig

_BIASES = frozenset({"attn.q", "attn.k", "attn.v"})


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, biases=_BIASES)
    return hf_config(raw, windows=windows(raw), biases=_BIASES)


def windows(raw: RawCheckpoint) -> list[int | None]:
    """From `use_sliding_window`: the layers from `max_window_layers` on slide."""
    fields = hf_fields(raw)
    layers = hf_layers(raw)
    if not fields.flag("use_sliding_window", False) or fields.get("sliding_window") is None:
        return [None] * layers
    first = 0 if fields.get("max_window_layers") == 0 else fields.count("max_window_layers", 28)
    return sliding_windows(fields, [layer >= first for layer in range(layers)])


FAMILY = Family("qwen2", "qwen2", read_config, HF_NAMES)
