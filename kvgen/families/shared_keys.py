"""Read what families have in common whose last layers attend to the keys and values of earlier ones: Gemma 3n and 4."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import HF_QK_NORM_NAMES, fields_of, row_count
from kvgen.families.family import GGUF_NAMES, NameTable
from kvgen.families.fields import Fields
from kvgen.families.gemma2 import SANDWICH_NAMES
from kvgen.model.config import DecoderConfig, LayerInputs
from kvgen.model.mixers import Attention, SharedAttention

HF_NAMES_WITH_INPUTS: NameTable = {
    **SANDWICH_NAMES,
    **HF_QK_NORM_NAMES,
    "model.embed_tokens_per_layer": "inputs.token_embd",
    "model.per_layer_model_projection": "inputs.projection",
    "model.per_layer_projection_norm": "inputs.norm",
    "model.layers.{i}.per_layer_input_gate": "blk.{i}.inputs.gate",
    "model.layers.{i}.per_layer_projection": "blk.{i}.inputs.projection",
    "model.layers.{i}.post_per_layer_input_norm": "blk.{i}.inputs.norm",
}
GGUF_NAMES_WITH_INPUTS: NameTable = {
    **GGUF_NAMES,
    "per_layer_token_embd": "inputs.token_embd",
    "per_layer_model_proj": "inputs.projection",
    "per_layer_proj_norm": "inputs.norm",
    "blk.{i}.inp_gate": "blk.{i}.inputs.gate",
    "blk.{i}.proj": "blk.{i}.inputs.projection",
    "blk.{i}.post_norm": "blk.{i}.inputs.norm",
}

_KEYS = re.compile(r"(?:model\.layers|blk)\.(\d+)\.(?:self_attn\.[kv]_(?:proj|norm)|attn_[kv]|attn_[kv]_norm)\.")


def each_layer(fields: Fields, name: str, count: int) -> list[int]:
    """Read a number for each layer, or one for all of them."""
    values = fields.get(name)
    if not isinstance(values, list):
        return [fields.count(name)] * count
    if len(values) != count or not all(type(value) is int and value > 0 for value in values):
        raise CheckpointError(f"{fields.path}: {fields.prefix}{name} must have a number of at least 1 for each layer")
    return values


def gguf_layer_inputs(raw: RawCheckpoint) -> LayerInputs | None:
    """Read their width, and the rows of their table from its tensor, as llama.cpp does."""
    width = fields_of(raw).whole("embedding_length_per_layer_input", 0)
    return LayerInputs(width, row_count(raw, "per_layer_token_embd.weight"), "gelu_tanh") if width else None


def with_shared_keys(config: DecoderConfig, count: int, path: Path) -> DecoderConfig:
    """Let each of the last `count` layers read what the last layer before them with the same window keeps."""
    first = len(config.layers) - count
    layers = list(config.layers)
    for number in range(max(first, 0), len(layers)):
        mixer = layers[number].mixer
        assert isinstance(mixer, Attention)
        states = [i for i in range(first) if getattr(layers[i].mixer, "window", None) == mixer.window]
        if not states:
            raise CheckpointError(f"{path}: layer {number} shares the keys of an earlier one, but none is of its kind")
        layers[number] = replace(layers[number], mixer=SharedAttention(mixer, states[-1]))
    return replace(config, layers=tuple(layers))


def has_no_keys(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor makes keys or values in a layer that reads those of another. For `Family.ignores`."""
    found = _KEYS.match(name)
    layer = int(found[1]) if found else len(config.layers)
    return layer < len(config.layers) and isinstance(config.layers[layer].mixer, SharedAttention)
