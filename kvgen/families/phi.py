"""Phi 1, 1.5 and 2: attention and MLP in parallel behind one layer norm, half of each head rotated."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, PLAIN_MLP, gguf_config, hf_config, hf_fields
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig, QKNorm

_BIASES = ATTENTION | PLAIN_MLP | {"attn_norm", "output_norm", "output"}
_NORMS = frozenset({"attn_norm"})
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
    if raw.format == "gguf":
        return gguf_config(
            raw,
            eps="attention.layer_norm_epsilon",
            norm="layer",
            norms=_NORMS,
            gated=False,
            activation="gelu_tanh",
            parallel=True,
            biases=_BIASES,
        )
    fields = hf_fields(raw)
    normed = fields.flag("qk_layernorm", False)
    return hf_config(
        raw,
        names=_HF_NAMES,
        eps="layer_norm_eps",
        rotary_share=fields.number("partial_rotary_factor", 0.5),
        norm="layer",
        norms=_NORMS,
        gated=False,
        parallel=True,
        qk_norm=QKNorm("layer", "head", fields.number("layer_norm_eps")) if normed else None,
        biases=_BIASES | ({"attn.q_norm", "attn.k_norm"} if normed else set()),
    )


FAMILY = Family("phi", "phi2", read_config, _HF_NAMES)
