"""GPT-NeoX and Pythia: attention and MLP in parallel, a part of each head rotated, layer norms."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, BLOCK_NORMS, PLAIN_MLP, gguf_config, gguf_fields, hf_config, hf_fields
from kvgen.families.family import Family, Transform
from kvgen.model.config import DecoderConfig

_HF_NAMES = {
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
    "gpt_neox.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "gpt_neox.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
    "gpt_neox.layers.{i}.attention": None,  # the causal mask of old files
    "gpt_neox.layers.{i}.attention.rotary_emb": None,  # the frequencies of old files
    "gpt_neox.layers.{i}.attention.query_key_value": "blk.{i}.attn.qkv",
    "gpt_neox.layers.{i}.attention.dense": "blk.{i}.attn.output",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h": "blk.{i}.ffn.up",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h": "blk.{i}.ffn.down",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _from_gguf(raw) if raw.format == "gguf" else _from_hf(raw)


def _from_hf(raw: RawCheckpoint) -> DecoderConfig:
    fields = hf_fields(raw)
    share = fields.number("rotary_pct", 0.25)
    renamed = {**raw.metadata, "rope_theta": fields.get("rope_theta") or fields.get("rotary_emb_base")}
    return hf_config(
        RawCheckpoint(raw.path, raw.format, renamed, raw.tensors),
        names=_HF_NAMES,
        eps="layer_norm_eps",
        kv_heads=fields.count("num_attention_heads"),
        rotary_share=share,
        norm="layer",
        gated=False,
        parallel=fields.flag("use_parallel_residual", True),
        biases=PLAIN_MLP | BLOCK_NORMS | (ATTENTION if fields.flag("attention_bias", True) else frozenset()),
    )


def _from_gguf(raw: RawCheckpoint) -> DecoderConfig:
    return gguf_config(
        raw,
        eps="attention.layer_norm_epsilon",
        norm="layer",
        gated=False,
        activation="gelu",
        parallel=gguf_fields(raw).flag("use_parallel_residual", True),
        biases=PLAIN_MLP | BLOCK_NORMS,
    )


def regroup(rows: Tensor, heads: int) -> Tensor:
    """(heads * 3 * D, ...), each head's query, key and value together, to all queries, all keys, all values."""
    return rows.view(heads, 3, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    return {"attn.qkv": partial(regroup, heads=config.attention.heads)}


FAMILY = Family("gpt_neox", "gptneox", read_config, _HF_NAMES, hf_transforms=hf_transforms)
