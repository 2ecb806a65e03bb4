"""Qwen3.5 with mixtures of experts in all layers."""

from __future__ import annotations

from dataclasses import replace

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import fields_of
from kvgen.families.experts import hf_ffns
from kvgen.families.family import Family, predicts_ahead
from kvgen.families.qwen3_5 import gguf_transforms
from kvgen.families.qwen3_moe import read_router
from kvgen.families.qwen3_next import (
    GGUF_NAMES_WITH_DELTA_NETS,
    HF_NAMES_WITH_DELTA_NETS,
    hf_transforms,
    read_gguf_ffns,
    read_hybrid,
)
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


FAMILY = Family(
    "qwen3_5_moe_text",
    "qwen35moe",
    read_config,
    HF_NAMES_WITH_DELTA_NETS,
    gguf_names=GGUF_NAMES_WITH_DELTA_NETS,
    hf_transforms=hf_transforms,
    gguf_transforms=gguf_transforms,
    ignores=predicts_ahead,
)
