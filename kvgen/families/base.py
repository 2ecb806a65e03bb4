"""What most families' configs have in common, read from config.json or from GGUF keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.family import GGUF_NAMES, NameTable, block_part, parameter_sources, parts_of
from kvgen.families.fields import Fields
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf
from kvgen.model.config import MLP, Activation, Attention, DecoderConfig, Layer, QKNorm, Rotary

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names for the decoder's."""

ATTENTION = frozenset({"attn.q", "attn.k", "attn.v", "attn.output"})
GATED_MLP = frozenset({"ffn.gate", "ffn.up", "ffn.down"})
PLAIN_MLP = frozenset({"ffn.up", "ffn.down"})
BLOCK_NORMS = frozenset({"attn_norm", "ffn_norm", "output_norm"})

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
"""The names that most families in transformers share."""


def hf_fields(raw: RawCheckpoint) -> Fields:
    """config.json, as a strict reader."""
    return Fields(raw.metadata, raw.path / "config.json")


def gguf_fields(raw: RawCheckpoint) -> Fields:
    """The keys of the file's architecture, as a strict reader."""
    return Fields(raw.metadata, raw.path, prefix=f"{raw.metadata['general.architecture']}.")


def hf_config(
    raw: RawCheckpoint,
    *,
    names: NameTable = HF_NAMES,
    eps: str = "rms_norm_eps",
    activation_field: str = "hidden_act",
    rotary_share: float = 1.0,
    rotaries: Sequence[Rotary | None] | None = None,
    windows: Sequence[int | None] | None = None,
    tied_head: bool = False,
    kv_heads: int | None = None,
    qk_norm: QKNorm | None = None,
    attention_scale: float | None = None,
    attention_softcap: float | None = None,
    gated: bool = True,
    activation: Activation | None = None,
    **mechanisms: Any,
) -> DecoderConfig:
    """The config of a family that names its sizes as most do.

    names: its tensors, which say what biases there are beside `mechanisms["biases"]`. eps, activation_field: the names
    of those fields. rotary_share: the share of a head that is rotated, unless the file says. rotaries, windows:
    one for each layer; the file's rotary everywhere, and no window, if not given. tied_head: if the file does not
    say. kv_heads, activation: None for what the file says. mechanisms: further fields of DecoderConfig.
    """
    fields = hf_fields(raw)
    heads, layers, head_dim = fields.count("num_attention_heads"), hf_layers(raw), hf_head_dim(fields)
    if rotaries is None:
        rotaries = [rotary_from_hf(fields, head_dim, default_share=rotary_share)] * layers
    if kv_heads is None:
        kv_heads = read_kv_heads(fields, "num_key_value_heads", heads)
    if activation is None:
        activation = _activation(fields, activation_field)
    attention = Attention(heads, kv_heads, head_dim, qk_norm=qk_norm, scale=attention_scale, softcap=attention_softcap)
    mlp = MLP(fields.count("intermediate_size"), gated, activation)
    return DecoderConfig(
        vocab_size=fields.count("vocab_size"),
        context_length=fields.count("max_position_embeddings"),
        dim=fields.count("hidden_size"),
        layers=make_layers(fields, layers, attention, mlp, rotaries, windows),
        norm_eps=fields.number(eps),
        **{
            "tied_head": hf_tied_head(raw, fields, names, default=tied_head),
            **mechanisms,
            "biases": stored_biases(raw, names) | mechanisms.get("biases", frozenset()),
        },
    )


def gguf_config(
    raw: RawCheckpoint,
    *,
    names: NameTable = GGUF_NAMES,
    eps: str = "attention.layer_norm_rms_epsilon",
    rotaries: Sequence[Rotary | None] | None = None,
    windows: Sequence[int | None] | None = None,
    scaled_attention: bool = False,
    qk_norm: QKNorm | None = None,
    attention_scale: float | None = None,
    attention_softcap: float | None = None,
    gated: bool = True,
    activation: Activation = "silu",
    **mechanisms: Any,
) -> DecoderConfig:
    """As `hf_config`, from GGUF keys. scaled_attention: whether the family reads `attention.scale` itself."""
    keys = gguf_fields(raw)
    if keys.get("expert_count"):
        raise UnsupportedError(f"{raw.path}: {keys.prefix}expert_count: mixtures of experts are not supported")
    dim, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    layers, head_dim = gguf_layers(raw), gguf_head_dim(keys)
    keys.require("attention.value_length", head_dim)
    keys.require("attention.clamp_kqv", None)
    if not scaled_attention:
        keys.require("attention.scale", None)
    embedding = raw.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{raw.path}: the tensor token_embd.weight is missing")
    if rotaries is None:
        rotaries = [rotary_from_gguf(raw, keys, head_dim)] * layers
    kv_heads = read_kv_heads(keys, "attention.head_count_kv", heads)
    attention = Attention(heads, kv_heads, head_dim, qk_norm=qk_norm, scale=attention_scale, softcap=attention_softcap)
    mlp = MLP(keys.count("feed_forward_length"), gated, activation)
    return DecoderConfig(
        vocab_size=embedding.shape[0],
        context_length=keys.count("context_length"),
        dim=dim,
        layers=make_layers(keys, layers, attention, mlp, rotaries, windows),
        norm_eps=keys.number(eps),
        **{
            "tied_head": "output.weight" not in raw.tensors,
            **mechanisms,
            "biases": stored_biases(raw, names) | mechanisms.get("biases", frozenset()),
        },
    )


def make_layers(
    fields: Fields,
    count: int,
    attention: Attention,
    mlp: MLP,
    rotaries: Sequence[Rotary | None],
    windows: Sequence[int | None] | None,
) -> tuple[Layer, ...]:
    """One Layer for each block; they differ in rotation and window alone.

    Raises CheckpointError if the lists that a file gives are not as long.
    """
    windows = [None] * count if windows is None else windows
    if len(rotaries) != count or len(windows) != count:
        raise CheckpointError(f"{fields.path}: its lists of layers do not have one entry for each of {count} layers")
    pairs = zip(rotaries, windows, strict=True)
    return tuple(Layer(replace(attention, rotary=rotary, window=window), mlp) for rotary, window in pairs)


def read_kv_heads(fields: Fields, name: str, heads: int) -> int:
    """How many heads keys and values have; as many as queries, if the file does not say."""
    count = fields.count(name, heads)
    if heads % count:
        raise CheckpointError(f"{fields.path}: {heads} heads cannot share {count} key-value heads")
    return count


def stored_biases(raw: RawCheckpoint, names: NameTable) -> frozenset[str]:
    """The layers that have a bias in the file, whatever the flags say."""
    found, _ = parameter_sources(raw.tensors, names)
    biased = [part for source in found if source.endswith(".bias") for part in parts_of(source)]
    return frozenset(block_part(parameter) for parameter in biased)


def hf_tied_head(raw: RawCheckpoint, fields: Fields, names: NameTable, *, default: bool) -> bool:
    """Whether the head is the embedding. A file may hold a head all the same, but then it must be a copy."""
    if not fields.flag("tie_word_embeddings", default):
        return False
    found, _ = parameter_sources(raw.tensors, names)
    head, embedding = (
        None if name not in found else raw.tensors[found[name][0]] for name in ("output.weight", "token_embd.weight")
    )
    if head is None or embedding is None:
        return True
    if not torch.equal(head.read(), embedding.read()):
        name = found["output.weight"][0]
        raise CheckpointError(f"{fields.path}: tie_word_embeddings is true, but {name} is not a copy of the embedding")
    return False


def flagged_biases(fields: Fields) -> frozenset[str]:
    """What `attention_bias` and `mlp_bias` say. The file must have these."""
    attention = ATTENTION if fields.flag("attention_bias", False) else frozenset()
    return attention | (GATED_MLP if fields.flag("mlp_bias", False) else frozenset())


def hf_layers(raw: RawCheckpoint, name: str = "num_hidden_layers") -> int:
    """`layer_count` of a Hugging Face folder."""
    return layer_count(raw, hf_fields(raw), name)


def gguf_layers(raw: RawCheckpoint) -> int:
    """`layer_count` of a GGUF file."""
    return layer_count(raw, gguf_fields(raw), "block_count")


def layer_count(raw: RawCheckpoint, fields: Fields, name: str) -> int:
    """The number of layers. Raises CheckpointError, before anything is made for each, if there are fewer tensors."""
    count = fields.count(name)
    if count > len(raw.tensors):
        raise CheckpointError(f"{raw.path}: says {count} layers, but holds {len(raw.tensors)} tensors")
    return count


def hf_head_dim(fields: Fields) -> int:
    """`head_dim`, or the width shared out."""
    return fields.count("head_dim", fields.count("hidden_size") // fields.count("num_attention_heads"))


def gguf_head_dim(keys: Fields) -> int:
    """`attention.key_length`, or the width shared out."""
    shared = keys.count("embedding_length") // keys.count("attention.head_count")
    return keys.count("attention.key_length", shared)


def sliding_windows(fields: Fields, default_types: Sequence[bool]) -> list[int | None]:
    """The window of each layer from `layer_types` and `sliding_window`; default_types says which slide without."""
    types = fields.get("layer_types")
    if types is None:
        slide = list(default_types)
    else:
        if not isinstance(types, list) or not all(t in ("full_attention", "sliding_attention") for t in types):
            raise UnsupportedError(
                f"{fields.path}: layer_types has other kinds than full_attention and sliding_attention"
            )
        slide = [t == "sliding_attention" for t in types]
    window = fields.count("sliding_window") if any(slide) else None
    return [window if slides else None for slides in slide]


def _activation(fields: Fields, name: str) -> Activation:
    value = fields.get(name)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.path}: {name} {value!r:.80} is not supported (kvgen has: {', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[value]
