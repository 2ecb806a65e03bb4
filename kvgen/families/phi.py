"""Phi 1, 1.5 and 2: attention and MLP in parallel behind one layer norm, half of each head rotated."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, HF_NAMES, PLAIN_MLP, fields_of, gguf_config, hf_config
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig

_BIASES = ATTENTION | PLAIN_MLP | {"attn_norm", "output_norm", "output"}
_HF_NAMES = {
    **HF_NAMES,
    "model.final_layernorm": "output_norm",
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
        attention={"qk_norm": "head" if has_qk_norm else None},
        biases=_BIASES | ({"attn.q_norm", "attn.k_norm"} if has_qk_norm else set()),
    )


FAMILY = Family("phi", "phi2", read_config, _HF_NAMES)
