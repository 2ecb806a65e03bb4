"""Read what most families' configs have in common, from config.json or from GGUF keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import starmap
from typing import Any, TypedDict

import torch

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.family import GGUF_NAMES, NameTable, block_part, parameter_sources, parts_of
from kvgen.families.fields import Fields
from kvgen.families.refused import experts_field
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.ffns import MLP, Activation, MoE
from kvgen.model.mixers import Attention, QKNorm, Rotary

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""transformers' names -> the decoder's."""

QKV = frozenset({"attn.q", "attn.k", "attn.v"})
ATTENTION = QKV | {"attn.output"}
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
    "model.layers.{i}.self_attn.rotary_emb": None,  # old checkpoints store the frequencies, which config.json gives
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn.gate",
    "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn.up",
    "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn.down",
}
"""Tensor names that most families share in transformers."""

HF_QK_NORM_NAMES: NameTable = {
    "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn.k_norm",
}

_SIZES = {
    "layers": ("num_hidden_layers", "block_count"),
    "dim": ("hidden_size", "embedding_length"),
    "heads": ("num_attention_heads", "attention.head_count"),
    "kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
    "ffn_width": ("intermediate_size", "feed_forward_length"),
    "context_length": ("max_position_embeddings", "context_length"),
    "window": ("sliding_window", "attention.sliding_window"),
}
"""The names of sizes in config.json and in GGUF files."""


def fields_of(raw: RawCheckpoint) -> Fields:
    """Return a strict reader of config.json, or of the GGUF keys of the file's architecture."""
    if raw.format == "gguf":
        return Fields(raw.metadata, raw.path, prefix=f"{raw.metadata['general.architecture']}.")
    return Fields(raw.metadata, raw.path / "config.json")


def read_size(raw: RawCheckpoint, size: str, default: int | None = None) -> int:
    """Read one of `_SIZES` in the checkpoint's format."""
    return fields_of(raw).count(_SIZES[size][raw.format == "gguf"], default)


def head_dim(raw: RawCheckpoint) -> int:
    """Return the size of a head; the width divided by the number of heads if the file does not say."""
    return read_size(raw, "head_dim", read_size(raw, "dim") // read_size(raw, "heads"))


def layer_count(raw: RawCheckpoint) -> int:
    """Return the number of layers. Raises CheckpointError if there are fewer tensors than layers."""
    count = read_size(raw, "layers")
    if raw.format == "gguf":  # which counts layers that predict further tokens too
        count = max(1, count - fields_of(raw).whole("nextn_predict_layers", 0))
    if count > len(raw.tensors):
        raise CheckpointError(f"{raw.path}: says {count} layers, but holds {len(raw.tensors)} tensors")
    return count


def row_count(raw: RawCheckpoint, name: str) -> int:
    """Return the number of rows of a tensor. Raises CheckpointError if it is missing."""
    if name not in raw.tensors:
        raise CheckpointError(f"{raw.path}: the tensor {name} is missing")
    return raw.tensors[name].shape[0]


class AttentionOptions(TypedDict, total=False):
    """What a family sets of `Attention`, the same in all layers."""

    qk_norm: QKNorm | None
    scale: float | None
    softcap: float | None
    query_rotary: Rotary | None
    value_norm: bool
    output_gate: bool
    sinks: bool


def hf_config(
    raw: RawCheckpoint,
    *,
    names: NameTable = HF_NAMES,
    eps: str = "rms_norm_eps",
    rotary_share: float = 1.0,
    tied_head: bool = False,
    gated: bool = True,
    activation: Activation | None = None,
    attention: AttentionOptions | None = None,
    **mechanisms: Any,
) -> DecoderConfig:
    """Read the decoder config of a family from config.json.

    names: the family's tensor names. eps: the name of a field. rotary_share, tied_head: defaults for
    `partial_rotary_factor` and `tie_word_embeddings`. gated, activation: of MLPs; `hidden_act` if it is None.
    mechanisms: see `_decoder_config`; `rotaries` are read from the file and `ffns` are MLPs unless given.
    """
    fields = fields_of(raw)
    if "rotaries" not in mechanisms:
        mechanisms["rotaries"] = rotary_from_hf(fields, head_dim(raw), default_share=rotary_share)
    if mechanisms.get("ffns") is None:
        mechanisms["ffns"] = _mlps(raw, gated, activation or read_activation(fields, "hidden_act"))
    return _decoder_config(
        raw,
        names,
        attention,
        vocab_size=fields.count("vocab_size"),
        norm_eps=fields.number(eps),
        tied_head=has_tied_head(raw, names, default=tied_head),
        **mechanisms,
    )


def gguf_config(
    raw: RawCheckpoint,
    *,
    names: NameTable = GGUF_NAMES,
    scaled_attention: bool = False,
    gated: bool = True,
    activation: Activation = "silu",
    attention: AttentionOptions | None = None,
    **mechanisms: Any,
) -> DecoderConfig:
    """Read the decoder config of a family from GGUF keys.

    scaled_attention: whether the family reads `attention.scale` itself. gated, activation: of MLPs.
    mechanisms: see `_decoder_config`; `rotaries` are read from the file and `ffns` are MLPs unless given.
    """
    keys = fields_of(raw)
    keys.require("attention.value_length", head_dim(raw))
    keys.require("attention.clamp_kqv", None)
    if not scaled_attention:
        keys.require("attention.scale", None)
    if "rotaries" not in mechanisms:
        mechanisms["rotaries"] = rotary_from_gguf(raw, keys, head_dim(raw))
    if mechanisms.get("ffns") is None:
        mechanisms["ffns"] = _mlps(raw, gated, activation)
    eps = "layer_norm_rms_epsilon" if mechanisms.get("norm", "rms") == "rms" else "layer_norm_epsilon"
    return _decoder_config(
        raw,
        names,
        attention,
        vocab_size=row_count(raw, "token_embd.weight"),
        norm_eps=keys.number(f"attention.{eps}"),
        tied_head="output.weight" not in raw.tensors,
        **mechanisms,
    )


def _mlps(raw: RawCheckpoint, gated: bool, activation: Activation) -> list[MLP]:
    """Return the MLP of each layer. Raises UnsupportedError if the file says that there are experts."""
    fields = fields_of(raw)
    if experts := experts_field(raw.metadata, fields.prefix):
        raise UnsupportedError(f"{fields.path}: this is a mixture of experts ({experts}), but its family is dense")
    return [MLP(read_size(raw, "ffn_width"), gated, activation)] * layer_count(raw)


def _decoder_config(
    raw: RawCheckpoint,
    names: NameTable,
    attention: AttentionOptions | None,
    *,
    rotaries: Rotary | Sequence[Rotary | None] | None,
    windows: int | Sequence[int | None] | None = None,
    ffns: Sequence[MLP | MoE],
    biases: frozenset[str] = frozenset(),
    **fields: Any,
) -> DecoderConfig:
    """Read the sizes and build the config.

    rotaries, windows: one for all layers, or a list with one for each. ffns: the feed-forward layer of each layer.
    biases: layers that must have a bias, besides those that have one in the file. fields: further fields of
    DecoderConfig.
    """
    heads, count = read_size(raw, "heads"), layer_count(raw)
    kv_heads, size = read_size(raw, "kv_heads", heads), head_dim(raw)
    path = fields_of(raw).path
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} heads cannot share {kv_heads} key-value heads")
    rotaries = rotaries if isinstance(rotaries, Sequence) else [rotaries] * count
    windows = windows if isinstance(windows, Sequence) else [windows] * count
    if len(rotaries) != count or len(windows) != count:
        raise CheckpointError(f"{path}: its lists of layers do not have one entry for each of {count} layers")
    mixers = [
        Attention(heads, kv_heads, size, rotary, window, **(attention or {}))
        for rotary, window in zip(rotaries, windows, strict=True)
    ]
    return DecoderConfig(
        context_length=read_size(raw, "context_length"),
        dim=read_size(raw, "dim"),
        layers=tuple(starmap(Layer, zip(mixers, ffns, strict=True))),
        biases=biases | stored_biases(raw, names),
        **fields,
    )


def stored_biases(raw: RawCheckpoint, names: NameTable) -> frozenset[str]:
    """Return the layers that have a bias in the file, whatever the config's flags say."""
    found, _ = parameter_sources(raw.tensors, names)
    biased = [part for source in found if source.endswith(".bias") for part in parts_of(source)]
    return frozenset(block_part(parameter) for parameter in biased)


def has_tied_head(raw: RawCheckpoint, names: NameTable, *, default: bool) -> bool:
    """Whether the head is the embedding. A file may store the head as well, if it is a copy of the embedding."""
    fields = fields_of(raw)
    if not fields.flag("tie_word_embeddings", default):
        return False
    found, _ = parameter_sources(raw.tensors, names)
    if not {"output.weight", "token_embd.weight"} <= found.keys():
        return True
    head, embedding = found["output.weight"][0], found["token_embd.weight"][0]
    if not torch.equal(raw.tensors[head].read(), raw.tensors[embedding].read()):
        raise CheckpointError(f"{fields.path}: tie_word_embeddings is true, but {head} is not a copy of the embedding")
    return False


def flagged_biases(raw: RawCheckpoint) -> frozenset[str]:
    """Return the layers that have a bias according to `attention_bias` and `mlp_bias`."""
    fields = fields_of(raw)
    attention = ATTENTION if fields.flag("attention_bias", False) else frozenset()
    return attention | (GATED_MLP if fields.flag("mlp_bias", False) else frozenset())


def sliding_windows(raw: RawCheckpoint, slides: Callable[[int], bool]) -> list[int | None]:
    """Return the window of each layer. slides: whether layer i has one, unless `layer_types` says so."""
    fields = fields_of(raw)
    types = fields.get("layer_types")
    if raw.format == "gguf" and fields.get("attention.sliding_window_pattern") is not None:
        sliding = _stored_pattern(raw)
    elif types is None:
        sliding = [slides(layer) for layer in range(layer_count(raw))]
    elif isinstance(types, list) and all(kind in ("full_attention", "sliding_attention") for kind in types):
        sliding = [kind == "sliding_attention" for kind in types]
    else:
        raise UnsupportedError(f"{fields.path}: layer_types may only contain full_attention and sliding_attention")
    window = read_size(raw, "window") if any(sliding) else None
    return [window if slides_here else None for slides_here in sliding]


def _stored_pattern(raw: RawCheckpoint) -> list[bool]:
    """Read which layers have a window: a flag for each, or the period of the layers that have none."""
    fields, name = fields_of(raw), "attention.sliding_window_pattern"
    flags, layers = fields.get(name), range(layer_count(raw))
    if isinstance(flags, list) and len(flags) == len(layers) and all(type(flag) is bool for flag in flags):
        return flags
    if isinstance(flags, list):
        raise CheckpointError(f"{fields.path}: {fields.prefix}{name} must have true or false for each layer")
    period = fields.count(name)
    return [(layer + 1) % period != 0 for layer in layers]


def read_activation(fields: Fields, name: str) -> Activation:
    """Read the name of an activation. Raises UnsupportedError for those that kvgen lacks."""
    value = fields.get(name)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.path}: {name} {value!r:.80} is not supported (kvgen has: {', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[value]
