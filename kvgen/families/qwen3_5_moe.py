"""Qwen3.5 with mixtures of experts in all layers."""

from __future__ import annotations

from dataclasses import replace

from kvgen.checkpoint import RawCheckpoint
from kvgen.families import qwen3_5
from kvgen.families.base import fields_of
from kvgen.families.experts import hf_ffns
from kvgen.families.qwen3_moe import read_router
from kvgen.families.qwen3_next import read_gguf_ffns, read_hybrid
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        return read_hybrid(raw, read_gguf_ffns(raw))
    fields.require("norm_topk_prob", True)
    fields.require("mlp_only_layers", [])
    router = replace(read_router(fields), normalize=True)
    shared = fields.count("shared_expert_intermediate_size")
    return read_hybrid(raw, hf_ffns(raw, router, shared=shared, shared_gate=True))


FAMILY = replace(qwen3_5.FAMILY, hf_model_type="qwen3_5_moe_text", gguf_architecture="qwen35moe", config=read_config)
