"""Llama 1, 2 and 3, and what is built like them: SmolLM2, TinyLlama."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.family import GGUF_NAMES, Family, NameTable, Transform, block_part, parameter_names
from kvgen.families.fields import Fields
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig

HF_NAMES: NameTable = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn.v",
    "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn.output",
    "model.layers.{i}.self_attn.rotary_emb": None,  # old checkpoints hold the frequencies, which config.json gives
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn.gate",
    "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn.up",
    "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn.down",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _from_gguf(raw) if raw.format == "gguf" else _from_hf(raw)


def _from_hf(raw: RawCheckpoint) -> DecoderConfig:
    fields = Fields(raw.metadata, raw.path / "config.json")
    fields.require("hidden_act", "silu")
    fields.require("sliding_window", None)
    dim, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    head_dim = fields.count("head_dim", dim // heads)
    flagged = {"attn.q", "attn.k", "attn.v", "attn.output"} if fields.flag("attention_bias", False) else set()
    flagged |= {"ffn.gate", "ffn.up", "ffn.down"} if fields.flag("mlp_bias", False) else set()
    return DecoderConfig(
        vocab_size=fields.count("vocab_size"),
        context_length=fields.count("max_position_embeddings"),
        dim=dim,
        layers=fields.count("num_hidden_layers"),
        heads=heads,
        kv_heads=_kv_heads(fields, "num_key_value_heads", heads),
        head_dim=_even(fields, head_dim),
        ffn_dim=fields.count("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps"),
        rotary=rotary_from_hf(fields, head_dim),
        tied_head=_hf_tied_head(raw, fields),
        biases=_biases(raw, HF_NAMES) | flagged,
    )


def _from_gguf(raw: RawCheckpoint) -> DecoderConfig:
    keys = Fields(raw.metadata, raw.path, prefix=f"{FAMILY.gguf_architecture}.")
    if keys.get("expert_count"):
        raise UnsupportedError(f"{raw.path}: {keys.prefix}expert_count: mixtures of experts are not supported")
    dim, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", dim // heads)
    keys.require("attention.value_length", head_dim)
    keys.require("attention.scale", None)
    keys.require("attention.clamp_kqv", None)
    embedding = raw.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{raw.path}: the tensor token_embd.weight is missing")
    return DecoderConfig(
        vocab_size=embedding.shape[0],
        context_length=keys.count("context_length"),
        dim=dim,
        layers=keys.count("block_count"),
        heads=heads,
        kv_heads=_kv_heads(keys, "attention.head_count_kv", heads),
        head_dim=_even(keys, head_dim),
        ffn_dim=keys.count("feed_forward_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rotary=rotary_from_gguf(raw, keys, head_dim),
        tied_head="output.weight" not in raw.tensors,
        biases=_biases(raw, GGUF_NAMES),
    )


def _kv_heads(fields: Fields, name: str, heads: int) -> int:
    kv_heads = fields.count(name, heads)
    if heads % kv_heads:
        raise CheckpointError(f"{fields.path}: {heads} heads cannot share {kv_heads} key-value heads")
    return kv_heads


def _even(fields: Fields, head_dim: int) -> int:
    if head_dim % 2:
        raise CheckpointError(f"{fields.path}: a head size of {head_dim} is odd; rotary positions need pairs")
    return head_dim


def _biases(raw: RawCheckpoint, names: NameTable) -> frozenset[str]:
    """The layers that have a bias in the file, whatever the flags say."""
    found, _ = parameter_names(raw.tensors, names)
    return frozenset(block_part(parameter) for parameter in found if parameter.endswith(".bias"))


def _hf_tied_head(raw: RawCheckpoint, fields: Fields) -> bool:
    """Whether the head is the embedding. A file may hold a head all the same, but then it must be a copy."""
    if not fields.flag("tie_word_embeddings", False):
        return False
    head, embedding = raw.tensors.get("lm_head.weight"), raw.tensors.get("model.embed_tokens.weight")
    if head is None:
        return True
    if embedding is None or not torch.equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{fields.path}: tie_word_embeddings is true, but lm_head.weight is not a copy of the embedding"
        )
    return False


def _gguf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    return {
        "attn.q": partial(split_halves, heads=config.heads),
        "attn.k": partial(split_halves, heads=config.kv_heads),
    }


def split_halves(rows: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order for interleaved rotation: pairs (2i, 2i + 1) become (i, i + D / 2).

    rows: (heads * D, ...), a weight or a bias of the query or key projection.
    """
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])  # (H, D / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(rows.shape)


FAMILY = Family(
    hf_model_type="llama",
    gguf_architecture="llama",
    config=read_config,
    hf_names=HF_NAMES,
    gguf_transforms=_gguf_transforms,
)
