"""Bamba: Mamba 2 in most layers, attention that rotates half of each head in the others."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, hf_config, layer_count
from kvgen.families.family import Family
from kvgen.families.fields import Fields
from kvgen.families.hybrids import (
    hf_mamba2_biases,
    hf_mamba2_transforms,
    mamba2_names,
    read_hf_mamba2,
    with_recurrences,
)
from kvgen.model.config import DecoderConfig

HF_NAMES_AROUND_MAMBA = {
    **HF_NAMES,
    "model.final_layernorm": "output_norm",
    "model.layers.{i}.pre_ff_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.feed_forward.gate_proj": "blk.{i}.ffn.gate",
    "model.layers.{i}.feed_forward.up_proj": "blk.{i}.ffn.up",
    "model.layers.{i}.feed_forward.down_proj": "blk.{i}.ffn.down",
}
_HF_NAMES = {**HF_NAMES_AROUND_MAMBA, **mamba2_names("model.layers.{i}.mamba")}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    fields.require("hidden_act", "silu")
    biases = flagged_biases(raw) | hf_mamba2_biases(fields)
    config = hf_config(raw, names=_HF_NAMES, rotary_share=0.5, biases=biases)
    return with_recurrences(config, read_hf_mamba2(raw), _attends(fields, layer_count(raw)))


def _attends(fields: Fields, count: int) -> list[bool]:
    indices = fields.get("attn_layer_indices") or []
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise CheckpointError(f"{fields.path}: attn_layer_indices is {indices!r:.80}; it must be a list of layers")
    return [layer in indices for layer in range(count)]


# In GGUF files it is a Granite 4 without multipliers.
FAMILY = Family("bamba", "", read_config, _HF_NAMES, hf_transforms=hf_mamba2_transforms)
