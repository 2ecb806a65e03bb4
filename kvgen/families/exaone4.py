"""EXAONE 4: norms after each part, on each head too; with windows, only the layers that have one rotate."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import fields_of, gguf_config, head_dim, hf_config, layer_count, sliding_windows
from kvgen.families.family import Family
from kvgen.families.olmo2 import NORMS, POST_NORM_NAMES
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig

_PERIOD = 4


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields, is_gguf = fields_of(raw), raw.format == "gguf"
    rotary = rotary_from_gguf(raw, fields, head_dim(raw)) if is_gguf else rotary_from_hf(fields, head_dim(raw))
    windows = _read_windows(raw)
    everywhere = not any(windows)
    shared: dict[str, Any] = {
        "norms": NORMS,
        "windows": windows,
        "rotaries": [rotary if window or everywhere else None for window in windows],
        "attention": {"qk_norm": "head"},
    }
    return gguf_config(raw, **shared) if is_gguf else hf_config(raw, **shared, names=POST_NORM_NAMES)


def _read_windows(raw: RawCheckpoint) -> list[int | None]:
    fields, is_gguf = fields_of(raw), raw.format == "gguf"
    if not fields.get("attention.sliding_window" if is_gguf else "sliding_window"):
        if not is_gguf:
            fields.require("layer_types", ["full_attention"] * layer_count(raw))
        return [None] * layer_count(raw)
    period = _PERIOD
    if not is_gguf and fields.get("layer_types") is None:
        period = fields.count("sliding_window_pattern", _PERIOD)
    return sliding_windows(raw, lambda layer: (layer + 1) % period != 0)


FAMILY = Family("exaone4", "exaone4", read_config, POST_NORM_NAMES)
