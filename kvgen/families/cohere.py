"""Command R: attention and MLP in parallel behind one layer norm, interleaved rotation, scaled logits."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, HF_QK_NORM_NAMES, fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.family import Family, Transform, split_halves
from kvgen.families.llama import gguf_transforms
from kvgen.model.config import DecoderConfig

PARALLEL: dict[str, Any] = {"norm": "layer", "norms": frozenset({"attn_norm"}), "parallel": True}
_LOGIT_SCALE = 0.0625  # transformers' default
_HF_NAMES = {**HF_NAMES, **HF_QK_NORM_NAMES}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        scale, has_norm = fields.number("logit_scale"), "blk.0.attn_q_norm.weight" in raw.tensors
        return gguf_config(raw, **PARALLEL, logit_scale=scale, attention={"qk_norm": "each-head" if has_norm else None})
    return hf_config(
        raw,
        **PARALLEL,
        names=_HF_NAMES,
        eps="layer_norm_eps",
        tied_head=True,
        logit_scale=logit_scale(raw),
        attention={"qk_norm": "each-head" if fields.flag("use_qk_norm", False) else None},
        biases=flagged_biases(raw),
    )


def logit_scale(raw: RawCheckpoint) -> float:
    return fields_of(raw).number("logit_scale", _LOGIT_SCALE)


def transforms(config: DecoderConfig) -> dict[str, Transform]:
    """Rotation is interleaved in both formats. The norms of queries and keys have the order of their rows."""

    def norm(weight: Tensor, heads: int) -> Tensor:
        return split_halves(weight.reshape(-1), heads).view(heads, -1)

    heads, kv_heads = config.attention.heads, config.attention.kv_heads
    norms = {"attn.q_norm": partial(norm, heads=heads), "attn.k_norm": partial(norm, heads=kv_heads)}
    return {**gguf_transforms(config), **norms}


FAMILY = Family("cohere", "command-r", read_config, _HF_NAMES, hf_transforms=transforms, gguf_transforms=transforms)
