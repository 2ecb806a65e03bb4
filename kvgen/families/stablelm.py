"""StableLM: Llama with layer norms, part of each head rotated; the 12B in parallel, with norms on each head."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import BLOCK_NORMS, HF_NAMES, QKV, fields_of, gguf_config, hf_config
from kvgen.families.family import Family, Transform
from kvgen.model.config import DecoderConfig

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.self_attn.q_layernorm.norms.{j}": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_layernorm.norms.{j}": "blk.{i}.attn.k_norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":  # like llama.cpp, look at which tensors there are
        parallel = "blk.0.ffn_norm.weight" not in raw.tensors
        return gguf_config(raw, **_norms(parallel, has_qk_norm="blk.0.attn_q_norm.weight" in raw.tensors))
    fields = fields_of(raw)
    mechanisms = _norms(fields.flag("use_parallel_residual", False), fields.flag("qk_layernorm", False))
    if fields.flag("use_qkv_bias", False):
        mechanisms["biases"] |= QKV
    share = fields.number("partial_rotary_factor", 0.25)
    return hf_config(raw, names=_HF_NAMES, eps="layer_norm_eps", rotary_share=share, **mechanisms)


def _norms(parallel: bool, has_qk_norm: bool) -> dict[str, Any]:
    norms = frozenset({"attn_norm"} if parallel else {"attn_norm", "ffn_norm"})
    return {
        "norm": "layer",
        "norms": norms,
        "parallel": parallel,
        "biases": BLOCK_NORMS & (norms | {"output_norm"}),
        "attention": {"qk_norm": "each-head" if has_qk_norm else None},
    }


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    """Add the dimension of heads if there is only one."""
    return dict.fromkeys(("attn.q_norm", "attn.k_norm"), lambda weight: weight.view(-1, config.attention.head_dim))


FAMILY = Family("stablelm", "stablelm", read_config, _HF_NAMES, hf_transforms=hf_transforms)
