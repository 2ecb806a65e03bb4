"""Gemma 2: norms before and after each part, soft caps, a window in every other layer."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import (
    HF_NAMES,
    fields_of,
    flagged_biases,
    gguf_config,
    head_dim,
    hf_config,
    read_activation,
    read_size,
    sliding_windows,
)
from kvgen.families.family import Family
from kvgen.families.gemma import embedding_scale, hf_transforms
from kvgen.model.config import DecoderConfig

NORMS = frozenset({"attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"})
SANDWICH_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    shared: dict[str, Any] = {
        "norms": NORMS,
        "windows": sliding_windows(raw, lambda layer: layer % 2 == 0),
        "embedding_scale": embedding_scale(raw),
        "activation": "gelu_tanh" if raw.format == "gguf" else read_activation(fields, "hidden_activation"),
    }
    if raw.format == "gguf":
        scale, softcap = gguf_attention_scale(raw, layers_27b=46), fields.number("attn_logit_softcapping", 50.0)
        return gguf_config(
            raw,
            **shared,
            attention={"scale": scale, "softcap": softcap},
            logit_softcap=fields.number("final_logit_softcapping", 30.0),
        )
    fields.require("use_bidirectional_attention", False)
    scale, cap = fields.number("query_pre_attn_scalar") ** -0.5, fields.optional_number("attn_logit_softcapping")
    return hf_config(
        raw,
        **shared,
        names=SANDWICH_NAMES,
        tied_head=True,
        attention={"scale": scale, "softcap": cap},
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        biases=flagged_biases(raw),
    )


def gguf_attention_scale(raw: RawCheckpoint, *, layers_27b: int) -> float:
    """GGUF files do not store it. Like llama.cpp, recognize the one model that differs by its number of layers."""
    is_27b = read_size(raw, "layers") == layers_27b
    size = read_size(raw, "dim") // read_size(raw, "heads") if is_27b else head_dim(raw)
    return float(size**-0.5)


FAMILY = Family("gemma2", "gemma2", read_config, SANDWICH_NAMES, hf_transforms=hf_transforms)
