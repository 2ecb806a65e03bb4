"""LFM2, dense: gated short convolutions in most layers, attention with a norm per head in the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import fields_of, gguf_config, head_dim, hf_config, layer_count
from kvgen.families.family import GGUF_NAMES, Family, Transforms
from kvgen.families.fields import Fields
from kvgen.families.rope import rotary_from_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import ShortConv

_CONV = frozenset({"attn.in_proj", "attn.conv", "attn.out_proj"})
_HF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.embedding_norm": "output_norm",
    "lm_head": "output",
    "model.layers.{i}.operator_norm": "blk.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn.v",
    "model.layers.{i}.self_attn.out_proj": "blk.{i}.attn.output",
    "model.layers.{i}.self_attn.q_layernorm": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_layernorm": "blk.{i}.attn.k_norm",
    "model.layers.{i}.conv.in_proj": "blk.{i}.attn.in_proj",
    "model.layers.{i}.conv.conv": "blk.{i}.attn.conv",
    "model.layers.{i}.conv.out_proj": "blk.{i}.attn.out_proj",
    "model.layers.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "model.layers.{i}.feed_forward.w1": "blk.{i}.ffn.gate",
    "model.layers.{i}.feed_forward.w2": "blk.{i}.ffn.down",
    "model.layers.{i}.feed_forward.w3": "blk.{i}.ffn.up",
}
_GGUF_NAMES = {
    **GGUF_NAMES,
    "token_embd_norm": "output_norm",  # llama.cpp's name for it
    "blk.{i}.shortconv.in_proj": "blk.{i}.attn.in_proj",
    "blk.{i}.shortconv.conv": "blk.{i}.attn.conv",
    "blk.{i}.shortconv.out_proj": "blk.{i}.attn.out_proj",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _read_gguf(raw) if raw.format == "gguf" else _read_hf(raw)


def _read_hf(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    dim = fields.count("hidden_size")
    for name in ("conv_dim", "conv_dim_out"):
        fields.require(name, dim)
    for name in ("block_use_swiglu", "use_pos_enc"):
        fields.require(name, True)
    tied = fields.flag("tie_embedding", fields.flag("tie_word_embeddings", True))
    raw = _with(raw, {"intermediate_size": _mlp_width(fields), "tie_word_embeddings": tied})
    config = hf_config(
        raw,
        names=_HF_NAMES,
        eps="norm_eps",
        activation="silu",
        qk_norm="head",
        rotaries=rotary_from_hf(fields, head_dim(raw), default_base=1e6),
        biases=_CONV if fields.flag("conv_bias", False) else frozenset(),
    )
    return _with_convolutions(config, _attention_layers(raw), fields.count("conv_L_cache", 3))


def _read_gguf(raw: RawCheckpoint) -> DecoderConfig:
    """A layer without key-value heads is a convolution."""
    keys, name = fields_of(raw), "attention.head_count_kv"
    counts = keys.get(name)
    counts = counts if isinstance(counts, list) else [counts] * layer_count(raw)
    kinds = {count for count in counts if count != 0}
    if len(counts) != layer_count(raw) or not all(type(count) is int for count in counts) or len(kinds) > 1:
        raise CheckpointError(f"{keys.path}: {keys.prefix}{name} must be 0 or one number of heads for each layer")
    raw = _with(raw, {f"{keys.prefix}{name}": max(counts, default=0) or keys.count("attention.head_count")})
    config = gguf_config(raw, names=_GGUF_NAMES, qk_norm="head")
    return _with_convolutions(config, [count != 0 for count in counts], keys.count("shortconv.l_cache"))


def _with(raw: RawCheckpoint, values: dict[str, Any]) -> RawCheckpoint:
    return replace(raw, metadata={**raw.metadata, **values})


def _mlp_width(fields: Fields) -> int:
    """transformers, `Lfm2MLP`: two thirds of the size that the config gives, scaled, rounded up."""
    width = fields.count("block_ff_dim", fields.optional_count("intermediate_size"))
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return width
    width, factor = int(2 * width / 3), "block_ffn_dim_multiplier"
    if factor in fields.values and fields.get(factor) is None:
        return width
    multiple = fields.count("block_multiple_of", 256)
    return multiple * math.ceil(int(fields.number(factor, 1.0) * width) / multiple)


def _attention_layers(raw: RawCheckpoint) -> list[bool]:
    fields, layers = fields_of(raw), range(layer_count(raw))
    types, indices = fields.get("layer_types"), fields.get("full_attn_idxs")
    if types is None and (indices is None or isinstance(indices, list)):
        return [indices is None or layer in indices for layer in layers]
    if isinstance(types, list) and len(types) == len(layers) and {"conv", "full_attention"}.issuperset(types):
        return [kind == "full_attention" for kind in types]
    raise CheckpointError(f"{fields.path}: layer_types must have conv or full_attention for each layer")


def _with_convolutions(config: DecoderConfig, attends: Sequence[bool], width: int) -> DecoderConfig:
    convolution = ShortConv(config.dim, width)
    pairs = zip(config.layers, attends, strict=True)
    return replace(config, layers=tuple(layer if kept else replace(layer, mixer=convolution) for layer, kept in pairs))


def hf_transforms(config: DecoderConfig) -> Transforms:
    """(channels, 1, width) as torch's Conv1d has it."""

    def two_dimensional(weight: Tensor) -> Tensor:
        return weight.squeeze(1) if weight.ndim == 3 else weight

    return {"attn.conv": two_dimensional}


FAMILY = Family("lfm2", "lfm2", read_config, _HF_NAMES, gguf_names=_GGUF_NAMES, hf_transforms=hf_transforms)
