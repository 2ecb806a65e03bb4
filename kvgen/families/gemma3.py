"""Gemma 3, text: two rotary bases, norms on queries and keys, a window in five layers of six."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import (
    gguf_config,
    gguf_fields,
    gguf_layers,
    hf_config,
    hf_fields,
    hf_head_dim,
    hf_layers,
    sliding_windows,
)
from kvgen.families.family import Family
from kvgen.families.fields import Fields
from kvgen.families.gemma import gguf_mechanisms, hf_mechanisms, hf_transforms
from kvgen.families.gemma2 import NORMS, SANDWICH_NAMES, gguf_attention_scale
from kvgen.families.rope import plain_rotary, rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig, QKNorm

_EVERY = 6  # one layer in so many sees everything
_LOCAL_BASE, _GLOBAL_BASE = 10_000.0, 1_000_000.0
_LARGEST = 62  # layers of the 27B model
_HF_NAMES = {
    **SANDWICH_NAMES,
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn.k_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _from_gguf(raw) if raw.format == "gguf" else _from_hf(raw)


def _from_hf(raw: RawCheckpoint) -> DecoderConfig:
    fields = hf_fields(raw)
    fields.require("use_bidirectional_attention", False)
    fields.require("attn_logit_softcapping", None)
    layers, every = hf_layers(raw), fields.count("sliding_window_pattern", _EVERY)
    windows = sliding_windows(fields, [bool((layer + 1) % every) for layer in range(layers)])
    head_dim = hf_head_dim(fields)
    everywhere, local = _rotary_fields(fields)
    global_rotary = rotary_from_hf(everywhere, head_dim, default_base=_GLOBAL_BASE)
    local_rotary = rotary_from_hf(local, head_dim, default_base=_LOCAL_BASE)
    return hf_config(
        raw,
        names=_HF_NAMES,
        activation_field="hidden_activation",
        tied_head=True,
        norms=NORMS,
        windows=windows,
        rotaries=[global_rotary if window is None else local_rotary for window in windows],
        qk_norm=QKNorm("rms", "head", fields.number("rms_norm_eps")),
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        **hf_mechanisms(raw),
    )


def _rotary_fields(fields: Fields) -> tuple[Fields, Fields]:
    """The fields that say how global and local layers rotate, in the new form or in that of the first releases."""
    nested = fields.section("rope_parameters")
    if nested is None:
        return fields, Fields({"rope_theta": fields.get("rope_local_base_freq")}, fields.path)
    context = fields.get("max_position_embeddings")
    everywhere, local = (
        Fields({"max_position_embeddings": context, "rope_parameters": nested.get(kind)}, fields.path)
        for kind in ("full_attention", "sliding_attention")
    )
    return everywhere, local


def _from_gguf(raw: RawCheckpoint) -> DecoderConfig:
    keys = gguf_fields(raw)
    layers, window = gguf_layers(raw), keys.count("attention.sliding_window")
    head_dim = keys.count("attention.key_length")
    windows = [window if (layer + 1) % _EVERY else None for layer in range(layers)]
    global_rotary = rotary_from_gguf(raw, keys, head_dim)
    local_rotary = plain_rotary(keys, head_dim, keys.number("rope.freq_base_swa", _LOCAL_BASE))
    return gguf_config(
        raw,
        norms=NORMS,
        windows=windows,
        rotaries=[local_rotary if window else global_rotary for window in windows],
        qk_norm=QKNorm("rms", "head", keys.number("attention.layer_norm_rms_epsilon")),
        attention_scale=gguf_attention_scale(raw, largest=_LARGEST),
        logit_softcap=keys.optional_number("final_logit_softcapping"),
        **gguf_mechanisms(raw),
    )


FAMILY = Family("gemma3_text", "gemma3", read_config, _HF_NAMES, hf_transforms=hf_transforms)
