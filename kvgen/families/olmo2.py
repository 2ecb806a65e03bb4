"""OLMo 2: norms after each part instead of before, and over all queries and keys at once."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig

_NORMS = frozenset({"post_attention_norm", "post_ffw_norm"})
_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn.k_norm",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        fields_of(raw).require("attention.sliding_window", None)
        return gguf_config(raw, norms=_NORMS, qk_norm="all")
    return hf_config(raw, names=_HF_NAMES, norms=_NORMS, qk_norm="all", biases=flagged_biases(raw))


FAMILY = Family("olmo2", "olmo2", read_config, _HF_NAMES)
