"""StableLM: layer norms around Llama's parts, a part of each head rotated; the 12B in parallel, with head norms."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import BLOCK_NORMS, HF_NAMES, gguf_config, gguf_fields, hf_config, hf_fields
from kvgen.families.family import Family, Transform
from kvgen.model.config import DecoderConfig, QKNorm

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.self_attn.q_layernorm.norms.{j}": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_layernorm.norms.{j}": "blk.{i}.attn.k_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        keys = gguf_fields(raw)
        parallel = "blk.0.ffn_norm.weight" not in raw.tensors  # llama.cpp goes by it too
        normed = "blk.0.attn_q_norm.weight" in raw.tensors
        return gguf_config(
            raw,
            eps="attention.layer_norm_epsilon",
            qk_norm=QKNorm("layer", "each-head", keys.number("attention.layer_norm_epsilon")) if normed else None,
            **_norms(parallel),
        )
    fields = hf_fields(raw)
    normed = fields.flag("qk_layernorm", False)
    norms = _norms(fields.flag("use_parallel_residual", False))
    if fields.flag("use_qkv_bias", False):
        norms["biases"] |= {"attn.q", "attn.k", "attn.v"}
    return hf_config(
        raw,
        names=_HF_NAMES,
        eps="layer_norm_eps",
        rotary_share=fields.number("partial_rotary_factor", 0.25),
        qk_norm=QKNorm("layer", "each-head", fields.number("layer_norm_eps")) if normed else None,
        **norms,
    )


def _norms(parallel: bool) -> dict[str, Any]:
    """In parallel, one norm serves both parts."""
    norms = frozenset({"attn_norm"} if parallel else {"attn_norm", "ffn_norm"})
    return {"norm": "layer", "parallel": parallel, "norms": norms, "biases": BLOCK_NORMS & (norms | {"output_norm"})}


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    """One head's norm is not stacked."""
    return dict.fromkeys(("attn.q_norm", "attn.k_norm"), lambda weight: weight.view(-1, config.attention.head_dim))


FAMILY = Family("stablelm", "stablelm", read_config, _HF_NAMES, hf_transforms=hf_transforms)
