"""Seed-OSS: Llama with biases on queries, keys and values."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import GATED_MLP, HF_NAMES, QKV, fields_of, gguf_config, hf_config
from kvgen.families.family import GGUF_NORM_NAMES, Family
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, names=GGUF_NORM_NAMES)
    fields = fields_of(raw)
    flags = {
        QKV: fields.flag("attention_bias", True),
        frozenset({"attn.output"}): fields.flag("attention_out_bias", False),
        GATED_MLP: fields.flag("mlp_bias", False),
    }
    return hf_config(raw, biases=frozenset().union(*(parts for parts, biased in flags.items() if biased)))


FAMILY = Family("seed_oss", "seed_oss", read_config, HF_NAMES, GGUF_NORM_NAMES)
