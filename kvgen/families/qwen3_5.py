"""Qwen3.5, dense: as Qwen3-Next with MLPs, and separate projections of the delta nets."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvgen.families.family import Family, OfColumns, Transforms, predicts_ahead
from kvgen.families.qwen3_next import (
    GGUF_NAMES_WITH_DELTA_NETS,
    HF_NAMES_WITH_DELTA_NETS,
    delta_nets,
    hf_transforms,
    read_hybrid,
)
from kvgen.families.qwen3_next import gguf_transforms as gguf_transforms_of_next
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import DeltaNet


def gguf_transforms(config: DecoderConfig) -> Transforms:
    """llama.cpp's converter has changed the order of the heads of values: the first of each head of keys come first."""
    transforms = dict(gguf_transforms_of_next(config))
    for net in delta_nets(config):
        transforms |= dict.fromkeys(
            ("attn.gate", "attn.a", "attn.b", "attn.A", "attn.dt"), partial(_by_key_head, net=net)
        )
        transforms |= dict.fromkeys(("attn.in_proj", "attn.conv"), partial(_values_by_key_head, net=net))
        transforms["attn.out_proj"] = OfColumns(partial(_by_key_head, net=net))
    return transforms


def _by_key_head(rows: Tensor, net: DeltaNet) -> Tensor:
    """Reorder (H * D, ...), so that the heads of values that share a head of keys are neighbours."""
    heads = rows.view(net.heads // net.key_heads, net.key_heads, -1, *rows.shape[1:])
    return heads.transpose(0, 1).reshape(rows.shape)


def _values_by_key_head(rows: Tensor, net: DeltaNet) -> Tensor:
    """Reorder the values of queries, keys and values."""
    return torch.cat((rows[: 2 * net.keys], _by_key_head(rows[2 * net.keys :], net)))


FAMILY = Family(
    "qwen3_5_text",
    "qwen35",
    read_hybrid,
    HF_NAMES_WITH_DELTA_NETS,
    gguf_names=GGUF_NAMES_WITH_DELTA_NETS,
    hf_transforms=hf_transforms,
    gguf_transforms=gguf_transforms,
    ignores=predicts_ahead,
)
