"""Mamba 2 alone in each layer, without attention and without MLPs."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import fields_of, has_tied_head, layer_count, read_size, row_count, stored_biases
from kvgen.families.family import GGUF_NAMES, Family
from kvgen.families.fields import Fields
from kvgen.families.hybrids import (
    check_mamba2,
    gguf_mamba2_names,
    gguf_mamba2_transforms,
    hf_mamba2_transforms,
    mamba2_names,
    read_dt_limit,
    read_gguf_mamba2,
)
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.mixers import Mamba2

_PROJECTIONS = frozenset({"attn.in_proj", "attn.out_proj"})
HF_NAMES = {
    "backbone.embeddings": "token_embd",
    "backbone.norm_f": "output_norm",
    "lm_head": "output",
    "backbone.layers.{i}.norm": "blk.{i}.attn_norm",
    **mamba2_names("backbone.layers.{i}.mixer"),
}
_GGUF_NAMES = {**GGUF_NAMES, **gguf_mamba2_names()}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        return _read_gguf(raw, fields)
    fields.require("hidden_act", "silu")
    mixer = Mamba2(
        heads=fields.count("num_heads"),
        head_dim=fields.count("head_dim"),
        groups=fields.count("n_groups", 8),
        size=fields.count("state_size", 128),
        width=fields.count("conv_kernel", 4),
        dt_limit=read_dt_limit(fields),
    )
    if mixer.inner != int(fields.number("expand", 2) * read_size(raw, "dim")):
        raise CheckpointError(f"{fields.path}: num_heads times head_dim is not expand times hidden_size")
    biases = (_PROJECTIONS if fields.flag("use_bias", False) else frozenset()) | stored_biases(raw, HF_NAMES)
    if fields.flag("use_conv_bias", True):
        biases |= {"attn.conv"}
    return _config(
        raw,
        mixer,
        vocab_size=fields.count("vocab_size"),
        context_length=None,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tied_head=has_tied_head(raw, HF_NAMES, default=False),
        biases=biases,
    )


def _read_gguf(raw: RawCheckpoint, keys: Fields) -> DecoderConfig:
    return _config(
        raw,
        read_gguf_mamba2(raw),
        vocab_size=row_count(raw, "token_embd.weight"),
        context_length=read_size(raw, "context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in raw.tensors,
        biases=stored_biases(raw, _GGUF_NAMES),
    )


def _config(raw: RawCheckpoint, mixer: Mamba2, **fields: Any) -> DecoderConfig:
    layers = (Layer(check_mamba2(mixer, raw), None),) * layer_count(raw)
    return DecoderConfig(dim=read_size(raw, "dim"), layers=layers, norms=frozenset({"attn_norm"}), **fields)


FAMILY = Family(
    "mamba2",
    "mamba2",
    read_config,
    HF_NAMES,
    gguf_names=_GGUF_NAMES,
    hf_transforms=hf_mamba2_transforms,
    gguf_transforms=gguf_mamba2_transforms,
)
