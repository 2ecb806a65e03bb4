"""dots.llm1: mixtures of experts as in DeepSeek-V3, norms on queries and keys."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import fields_of, flagged_biases, gguf_config, hf_config, sliding_windows
from kvgen.families.family import Family
from kvgen.families.glm4_moe import HF_NAMES_WITH_QK_NORM, read_gguf_ffns, read_hf_ffns
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        return gguf_config(raw, attention={"qk_norm": "head"}, ffns=read_gguf_ffns(raw))
    last = fields.whole("max_window_layers", 62)
    has_windows = fields.get("sliding_window") is not None
    return hf_config(
        raw,
        names=HF_NAMES_WITH_QK_NORM,
        ffns=read_hf_ffns(raw),
        windows=sliding_windows(raw, lambda layer: has_windows and layer >= last),
        attention={"qk_norm": "head"},
        biases=flagged_biases(raw),
    )


FAMILY = Family("dots1", "dots1", read_config, HF_NAMES_WITH_QK_NORM)
