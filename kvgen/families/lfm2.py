"""LFM2, dense: gated short convolutions in most layers, attention with a norm per head in the others."""

from __future__ import annotations

import math
from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import fields_of, gguf_config, head_dim, hf_config, layer_count
from kvgen.families.family import GGUF_NAMES, Family, NameTable, Transforms
from kvgen.families.fields import Fields
from kvgen.families.hybrids import convolution, read_sizes, with_recurrences
from kvgen.families.rope import rotary_from_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import ShortConv

_CONV = frozenset({"attn.in_proj", "attn.conv", "attn.out_proj"})
HF_NAMES = {
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
GGUF_CONV_NAMES = {
    **GGUF_NAMES,
    "token_embd_norm": "output_norm",  # llama.cpp's name for it
    "blk.{i}.shortconv.in_proj": "blk.{i}.attn.in_proj",
    "blk.{i}.shortconv.conv": "blk.{i}.attn.conv",
    "blk.{i}.shortconv.out_proj": "blk.{i}.attn.out_proj",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return read_gguf(raw)
    return read_hf(raw.with_metadata({"intermediate_size": _mlp_width(fields_of(raw))}), HF_NAMES)


def read_hf(raw: RawCheckpoint, names: NameTable, **mechanisms: Any) -> DecoderConfig:
    """names, mechanisms: see `hf_config`."""
    fields = fields_of(raw)
    dim = fields.count("hidden_size")
    for name in ("conv_dim", "conv_dim_out"):
        fields.require(name, dim)
    for name in ("block_use_swiglu", "use_pos_enc"):
        fields.require(name, True)
    tied = fields.flag("tie_embedding", fields.flag("tie_word_embeddings", True))
    config = hf_config(
        raw.with_metadata({"tie_word_embeddings": tied}),
        names=names,
        eps="norm_eps",
        activation="silu",
        attention={"qk_norm": "head"},
        rotaries=rotary_from_hf(fields, head_dim(raw), default_base=1e6),
        biases=_CONV if fields.flag("conv_bias", False) else frozenset(),
        **mechanisms,
    )
    return with_recurrences(config, ShortConv(dim, fields.count("conv_L_cache", 3)), _attention_layers(raw))


def read_gguf(raw: RawCheckpoint, **mechanisms: Any) -> DecoderConfig:
    """A layer without key-value heads is a convolution. mechanisms: see `gguf_config`."""
    raw, attends = read_sizes(raw, "attention.head_count_kv")
    config = gguf_config(raw, names=GGUF_CONV_NAMES, attention={"qk_norm": "head"}, **mechanisms)
    return with_recurrences(config, ShortConv(config.dim, fields_of(raw).count("shortconv.l_cache")), attends)


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


def hf_transforms(config: DecoderConfig) -> Transforms:
    return {"attn.conv": convolution}


FAMILY = Family("lfm2", "lfm2", read_config, HF_NAMES, gguf_names=GGUF_CONV_NAMES, hf_transforms=hf_transforms)
