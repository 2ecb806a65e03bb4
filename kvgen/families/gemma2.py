"""Gemma 2: norms before and after each part, soft caps, a window in every other layer."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import (
    HF_NAMES,
    gguf_config,
    gguf_fields,
    gguf_layers,
    hf_config,
    hf_fields,
    hf_layers,
    sliding_windows,
)
from kvgen.families.family import Family
from kvgen.families.gemma import gguf_mechanisms, hf_mechanisms, hf_transforms
from kvgen.model.config import DecoderConfig

NORMS = frozenset({"attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"})
_LARGEST = 46  # layers of the 27B model, which scales attention by its heads' share of the width

SANDWICH_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _from_gguf(raw) if raw.format == "gguf" else _from_hf(raw)


def _from_hf(raw: RawCheckpoint) -> DecoderConfig:
    fields = hf_fields(raw)
    fields.require("use_bidirectional_attention", False)
    layers = hf_layers(raw)
    return hf_config(
        raw,
        names=SANDWICH_NAMES,
        activation_field="hidden_activation",
        tied_head=True,
        norms=NORMS,
        windows=sliding_windows(fields, [layer % 2 == 0 for layer in range(layers)]),
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        **hf_mechanisms(raw),
    )


def _from_gguf(raw: RawCheckpoint) -> DecoderConfig:
    keys = gguf_fields(raw)
    layers, window = gguf_layers(raw), keys.count("attention.sliding_window")
    return gguf_config(
        raw,
        norms=NORMS,
        windows=[None if layer % 2 else window for layer in range(layers)],
        attention_scale=gguf_attention_scale(raw, largest=_LARGEST),
        attention_softcap=keys.number("attn_logit_softcapping", 50.0),
        logit_softcap=keys.number("final_logit_softcapping", 30.0),
        **gguf_mechanisms(raw),
    )


def gguf_attention_scale(raw: RawCheckpoint, *, largest: int) -> float:
    """GGUF files do not say it. llama.cpp tells the one model that differs by its number of layers."""
    keys = gguf_fields(raw)
    per_head = keys.count("embedding_length") // keys.count("attention.head_count")
    scalar = per_head if keys.count("block_count") == largest else keys.count("attention.key_length", per_head)
    return float(scalar**-0.5)


FAMILY = Family("gemma2", "gemma2", read_config, SANDWICH_NAMES, hf_transforms=hf_transforms)
