"""Mamba 2 alone in each layer, without attention and without MLPs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import fields_of, has_tied_head, layer_count, read_size, stored_biases
from kvgen.families.family import GGUF_NAMES, Family, Transforms
from kvgen.families.fields import Fields
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.mixers import Mamba2

_PROJECTIONS = frozenset({"attn.in_proj", "attn.out_proj"})
_HF_NAMES = {
    "backbone.embeddings": "token_embd",
    "backbone.norm_f": "output_norm",
    "lm_head": "output",
    "backbone.layers.{i}.norm": "blk.{i}.attn_norm",
    "backbone.layers.{i}.mixer.in_proj": "blk.{i}.attn.in_proj",
    "backbone.layers.{i}.mixer.conv1d": "blk.{i}.attn.conv",
    "backbone.layers.{i}.mixer.dt_bias": "blk.{i}.attn.dt.weight",
    "backbone.layers.{i}.mixer.A_log": "blk.{i}.attn.A.weight",
    "backbone.layers.{i}.mixer.D": "blk.{i}.attn.D.weight",
    "backbone.layers.{i}.mixer.norm": "blk.{i}.attn.norm",
    "backbone.layers.{i}.mixer.out_proj": "blk.{i}.attn.out_proj",
}
_GGUF_NAMES = {
    **GGUF_NAMES,
    "blk.{i}.ssm_in": "blk.{i}.attn.in_proj",
    "blk.{i}.ssm_conv1d": "blk.{i}.attn.conv",
    "blk.{i}.ssm_dt.bias": "blk.{i}.attn.dt.weight",
    "blk.{i}.ssm_a": "blk.{i}.attn.A.weight",
    "blk.{i}.ssm_d": "blk.{i}.attn.D.weight",
    "blk.{i}.ssm_norm": "blk.{i}.attn.norm",
    "blk.{i}.ssm_out": "blk.{i}.attn.out_proj",
}


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
        dt_limit=_read_limits(fields),
    )
    if mixer.inner != int(fields.number("expand", 2) * read_size(raw, "dim")):
        raise CheckpointError(f"{fields.path}: num_heads times head_dim is not expand times hidden_size")
    biases = (_PROJECTIONS if fields.flag("use_bias", False) else frozenset()) | stored_biases(raw, _HF_NAMES)
    if fields.flag("use_conv_bias", True):
        biases |= {"attn.conv"}
    return _config(
        raw,
        mixer,
        vocab_size=fields.count("vocab_size"),
        context_length=None,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tied_head=has_tied_head(raw, _HF_NAMES, default=False),
        biases=biases,
    )


def _read_gguf(raw: RawCheckpoint, keys: Fields) -> DecoderConfig:
    heads, inner = keys.count("ssm.time_step_rank"), keys.count("ssm.inner_size")
    embedding = raw.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{raw.path}: the tensor token_embd.weight is missing")
    if inner % heads:
        raise CheckpointError(f"{raw.path}: {heads} heads do not divide a width of {inner}")
    mixer = Mamba2(
        heads=heads,
        head_dim=inner // heads,
        groups=keys.count("ssm.group_count"),
        size=keys.count("ssm.state_size"),
        width=keys.count("ssm.conv_kernel"),
    )
    return _config(
        raw,
        mixer,
        vocab_size=embedding.shape[0],
        context_length=read_size(raw, "context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in raw.tensors,
        biases=stored_biases(raw, _GGUF_NAMES),
    )


def _config(raw: RawCheckpoint, mixer: Mamba2, **fields: Any) -> DecoderConfig:
    if mixer.heads % mixer.groups or mixer.inner % mixer.groups:
        raise CheckpointError(f"{raw.path}: {mixer.heads} heads cannot be {mixer.groups} groups")
    layers = (Layer(mixer, None),) * layer_count(raw)
    return DecoderConfig(dim=read_size(raw, "dim"), layers=layers, norms=frozenset({"attn_norm"}), **fields)


def _read_limits(fields: Fields) -> tuple[float, float]:
    """transformers writes infinity, which JSON does not have, as an object."""
    limits = fields.get("time_step_limit")
    if limits is None:
        return 0.0, math.inf
    numbers = [math.inf if limit == {"__float__": "Infinity"} else limit for limit in limits]
    if len(numbers) != 2 or not all(type(number) in (int, float) for number in numbers):
        raise CheckpointError(f"{fields.path}: time_step_limit is {limits!r:.80}; it must be two numbers")
    return float(numbers[0]), float(numbers[1])


def hf_transforms(config: DecoderConfig) -> Transforms:
    """The file has the logarithms of the decay rates; and (channels, 1, width), as torch's Conv1d has it."""

    def convolution(tensor: Tensor) -> Tensor:
        return tensor.squeeze(1) if tensor.ndim == 3 else tensor

    return {"attn.A": lambda logarithms: -torch.exp(logarithms.float()), "attn.conv": convolution}


def gguf_transforms(config: DecoderConfig) -> Transforms:
    """llama.cpp adds dimensions to vectors."""
    return dict.fromkeys(("attn.A", "attn.D", "attn.norm"), torch.flatten)


FAMILY = Family(
    "mamba2",
    "mamba2",
    read_config,
    _HF_NAMES,
    gguf_names=_GGUF_NAMES,
    hf_transforms=hf_transforms,
    gguf_transforms=gguf_transforms,
)
