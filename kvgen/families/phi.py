"""Phi 1, 1.5 and 2: attention and MLP in parallel behind one layer norm, half of each head rotated."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, PLAIN_MLP, fields_of, gguf_config, hf_config
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig

_BIASES = ATTENTION | PLAIN_MLP | {"attn_norm", "output_norm", "output"}
_HF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn.v",
    "model.layers.{i}.self_attn.q_layernorm": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_layernorm": "blk.{i}.attn.k_norm",
    "model.layers.{i}.self_attn.dense": "blk.{i}.attn.output",
    "model.layers.{i}.mlp.fc1": "blk.{i}.ffn.up",
    "model.layers.{i}.mlp.fc2": "blk.{i}.ffn.down",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    mechanisms: dict[str, Any] = {
        "norm": "layer",
        "norms": frozenset({"attn_norm"}),
        "gated": False,
        "parallel": True,
    }
    if raw.format == "gguf":
        return gguf_config(raw, **mechanisms, activation="gelu_tanh", biases=_BIASES)
    fields = fields_of(raw)
    has_qk_norm = fields.flag("qk_layernorm", False)
    return hf_config(
        raw,
        **mechanisms,
        names=_HF_NAMES,
        eps="layer_norm_eps",
        rotary_share=fields.number("partial_rotary_factor", 0.5),
        qk_norm="head" if has_qk_norm else None,
        biases=_BIASES | ({"attn.q_norm", "attn.k_norm"} if has_qk_norm else set()),
    )


FAMILY = Family("phi", "phi2", read_config, _HF_NAMES)
