"""GPT-NeoX and Pythia: attention and MLP in parallel, part of each head rotated, layer norms."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, BLOCK_NORMS, PLAIN_MLP, fields_of, gguf_config, hf_config
from kvgen.families.family import Family, Transform
from kvgen.model.config import DecoderConfig

_HF_NAMES = {
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
    "gpt_neox.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "gpt_neox.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
    "gpt_neox.layers.{i}.attention": None,  # old checkpoints store the causal mask
    "gpt_neox.layers.{i}.attention.rotary_emb": None,  # old checkpoints store the frequencies
    "gpt_neox.layers.{i}.attention.query_key_value": "blk.{i}.attn.qkv",
    "gpt_neox.layers.{i}.attention.dense": "blk.{i}.attn.output",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h": "blk.{i}.ffn.up",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h": "blk.{i}.ffn.down",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields, biases = fields_of(raw), PLAIN_MLP | BLOCK_NORMS
    parallel = fields.flag("use_parallel_residual", True)
    mechanisms: dict[str, Any] = {"norm": "layer", "gated": False, "parallel": parallel}
    if raw.format == "gguf":
        return gguf_config(raw, **mechanisms, activation="gelu", biases=biases)
    base = fields.get("rope_theta") or fields.get("rotary_emb_base")
    changes = {"rope_theta": base, "num_key_value_heads": None}  # every head has its own keys, whatever the file says
    return hf_config(
        raw.with_metadata(changes),
        **mechanisms,
        names=_HF_NAMES,
        eps="layer_norm_eps",
        rotary_share=fields.number("rotary_pct", 0.25),
        biases=biases | (ATTENTION if fields.flag("attention_bias", True) else frozenset()),
    )


def group_by_projection(rows: Tensor, heads: int) -> Tensor:
    """Reorder (H * 3 * D, ...) from the query, key and value of each head to all queries, all keys, all values."""
    return rows.view(heads, 3, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    return {"attn.qkv": partial(group_by_projection, heads=config.attention.heads)}


FAMILY = Family("gpt_neox", "gptneox", read_config, _HF_NAMES, hf_transforms=hf_transforms)
