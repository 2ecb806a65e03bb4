"""Llama 1, 2 and 3, and models with the same architecture: SmolLM2, TinyLlama."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.experts import gguf_ffns
from kvgen.families.family import Family, Transform, split_fused, split_halves
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":  # Mixtral too
        return gguf_config(raw, ffns=gguf_ffns(raw, normalize=True) if fields_of(raw).get("expert_count") else None)
    fields_of(raw).require("sliding_window", None)
    return hf_config(raw, biases=flagged_biases(raw))


def gguf_transforms(config: DecoderConfig, rotated: int | None = None) -> dict[str, Transform]:
    """llama.cpp stores this family's queries and keys for interleaved rotation, alone or with values in one tensor.

    rotated: see `split_halves`.
    """
    queries = partial(split_halves, heads=config.attention.heads, rotated=rotated)
    keys = partial(split_halves, heads=config.attention.kv_heads, rotated=rotated)

    def fused(rows: Tensor) -> Tensor:
        q, k, v = split_fused(rows, "attn.qkv.weight", config)
        return torch.cat((queries(q), keys(k), v))

    return {"attn.q": queries, "attn.k": keys, "attn.qkv": fused}


FAMILY = Family("llama", "llama", read_config, HF_NAMES, gguf_transforms=gguf_transforms)
