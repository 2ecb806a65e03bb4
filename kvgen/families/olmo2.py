"""OLMo 2: norms after each part instead of before, and over all queries and keys at once."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import (
    HF_NAMES,
    HF_QK_NORM_NAMES,
    fields_of,
    flagged_biases,
    gguf_config,
    head_dim,
    hf_config,
    sliding_windows,
)
from kvgen.families.family import Family
from kvgen.families.rope import plain_rotary, rotary_from_gguf
from kvgen.model.config import DecoderConfig


def _gguf_windows(raw: RawCheckpoint) -> dict[str, Any]:
    """OLMo 3 has the same architecture in GGUF files: with windows, in which positions are not scaled."""
    keys, size = fields_of(raw), head_dim(raw)
    if not keys.get("attention.sliding_window"):
        return {}
    windows = sliding_windows(raw, lambda layer: (layer + 1) % 4 != 0)
    whole = rotary_from_gguf(raw, keys, size)
    local = plain_rotary(keys, size, keys.number("rope.freq_base_swa", keys.number("rope.freq_base", 10000.0)))
    return {"windows": windows, "rotaries": [whole if window is None else local for window in windows]}


NORMS = frozenset({"post_attention_norm", "post_ffw_norm"})
POST_NORM_NAMES = {
    **HF_NAMES,
    **HF_QK_NORM_NAMES,
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, norms=NORMS, attention={"qk_norm": "all"}, **_gguf_windows(raw))
    return hf_config(raw, names=POST_NORM_NAMES, norms=NORMS, attention={"qk_norm": "all"}, biases=flagged_biases(raw))


FAMILY = Family("olmo2", "olmo2", read_config, POST_NORM_NAMES)
