"""Gemma 3, text: two rotary bases, norms on queries and keys, a window in five layers of six."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import (
    HF_QK_NORM_NAMES,
    fields_of,
    flagged_biases,
    gguf_config,
    head_dim,
    hf_config,
    read_activation,
    sliding_windows,
)
from kvgen.families.family import Family
from kvgen.families.fields import Fields
from kvgen.families.gemma import embedding_scale, hf_transforms
from kvgen.families.gemma2 import NORMS, SANDWICH_NAMES, gguf_attention_scale
from kvgen.families.rope import plain_rotary, rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import Rotary

_PATTERN = 6  # every sixth layer has no window
_LOCAL_BASE, _GLOBAL_BASE = 10_000.0, 1_000_000.0
_DEFAULTS: dict[str, Any] = {  # of transformers' Gemma3TextConfig; config.json files with images leave them out
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
}
_HF_NAMES = {**SANDWICH_NAMES, **HF_QK_NORM_NAMES}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "hf":
        raw = raw.with_defaults(_DEFAULTS)
    fields = fields_of(raw)
    pattern = fields.count("sliding_window_pattern", _PATTERN)
    windows = sliding_windows(raw, lambda layer: (layer + 1) % pattern != 0)
    global_rotary, local_rotary = gguf_rotaries(raw) if raw.format == "gguf" else hf_rotaries(raw)
    shared: dict[str, Any] = {
        "norms": NORMS,
        "windows": windows,
        "rotaries": [global_rotary if window is None else local_rotary for window in windows],
        "embedding_scale": embedding_scale(raw),
        "logit_softcap": fields.optional_number("final_logit_softcapping"),
    }
    if raw.format == "gguf":
        scale = gguf_attention_scale(raw, layers_27b=62)
        return gguf_config(raw, **shared, activation="gelu_tanh", attention={"qk_norm": "head", "scale": scale})
    fields.require("use_bidirectional_attention", False)
    fields.require("attn_logit_softcapping", None)
    return hf_config(
        raw,
        **shared,
        names=_HF_NAMES,
        activation=read_activation(fields, "hidden_activation"),
        tied_head=True,
        attention={"qk_norm": "head", "scale": fields.number("query_pre_attn_scalar") ** -0.5},
        biases=flagged_biases(raw),
    )


def hf_rotaries(raw: RawCheckpoint) -> tuple[Rotary, Rotary]:
    """Return the rotary of global and of local layers; transformers 5 nests them, older versions do not."""
    fields = fields_of(raw)
    nested = fields.section("rope_parameters")
    if nested is None:
        whole, local = fields, Fields({"rope_theta": fields.get("rope_local_base_freq")}, fields.path)
    else:
        context = fields.get("max_position_embeddings")
        whole, local = (
            Fields({"max_position_embeddings": context, "rope_parameters": nested.get(kind)}, fields.path)
            for kind in ("full_attention", "sliding_attention")
        )
    return (
        rotary_from_hf(whole, head_dim(raw), default_base=_GLOBAL_BASE),
        rotary_from_hf(local, head_dim(raw), default_base=_LOCAL_BASE),
    )


def gguf_rotaries(raw: RawCheckpoint) -> tuple[Rotary, Rotary]:
    keys, size = fields_of(raw), head_dim(raw)
    local_base = keys.number("rope.freq_base_swa", _LOCAL_BASE)
    return rotary_from_gguf(raw, keys, size), plain_rotary(keys, size, local_base)


FAMILY = Family("gemma3_text", "gemma3", read_config, _HF_NAMES, hf_transforms=hf_transforms)
