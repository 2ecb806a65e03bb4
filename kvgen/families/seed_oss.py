"""Seed-OSS: Llama with biases on queries, keys and values."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import GATED_MLP, HF_NAMES, fields_of, gguf_config, hf_config
from kvgen.families.family import GGUF_NAMES, Family
from kvgen.model.config import DecoderConfig

_GGUF_NAMES = {**GGUF_NAMES, "blk.{i}.post_attention_norm": "blk.{i}.ffn_norm"}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, names=_GGUF_NAMES)
    fields = fields_of(raw)
    flags = {
        frozenset({"attn.q", "attn.k", "attn.v"}): fields.flag("attention_bias", True),
        frozenset({"attn.output"}): fields.flag("attention_out_bias", False),
        GATED_MLP: fields.flag("mlp_bias", False),
    }
    return hf_config(raw, biases=frozenset().union(*(parts for parts, biased in flags.items() if biased)))


FAMILY = Family("seed_oss", "seed_oss", read_config, HF_NAMES, _GGUF_NAMES)
