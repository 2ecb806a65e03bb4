"""Qwen3, dense: a norm on each head's queries and keys instead of Qwen2's biases."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, flagged_biases, gguf_config, gguf_fields, hf_config, hf_fields
from kvgen.families.family import Family
from kvgen.families.qwen2 import windows
from kvgen.model.config import DecoderConfig, QKNorm

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn.k_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        eps = gguf_fields(raw).number("attention.layer_norm_rms_epsilon")
        return gguf_config(raw, qk_norm=QKNorm("rms", "head", eps))
    fields = hf_fields(raw)
    return hf_config(
        raw,
        names=_HF_NAMES,
        windows=windows(raw),
        qk_norm=QKNorm("rms", "head", fields.number("rms_norm_eps")),
        biases=flagged_biases(fields),
    )


FAMILY = Family("qwen3", "qwen3", read_config, _HF_NAMES)
