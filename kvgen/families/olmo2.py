"""OLMo 2: norms after each part instead of before, and over all queries and keys at once."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, flagged_biases, gguf_config, gguf_fields, hf_config, hf_fields
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig, QKNorm

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
        eps = gguf_fields(raw).number("attention.layer_norm_rms_epsilon")
        gguf_fields(raw).require("attention.sliding_window", None)
        return gguf_config(raw, norms=_NORMS, qk_norm=QKNorm("rms", "all", eps))
    fields = hf_fields(raw)
    return hf_config(
        raw,
        names=_HF_NAMES,
        norms=_NORMS,
        qk_norm=QKNorm("rms", "all", fields.number("rms_norm_eps")),
        biases=flagged_biases(fields),
    )


FAMILY = Family("olmo2", "olmo2", read_config, _HF_NAMES)
