"""Read what hybrids of attention and recurrent mixers have in common, and Mamba 2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import fields_of, layer_count, read_size
from kvgen.families.family import NameTable, Transforms
from kvgen.families.fields import Fields
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import Mamba2, Mixer

_PARTS = {
    "in_proj": "in_proj",
    "conv1d": "conv",
    "dt_bias": "dt.weight",
    "A_log": "A.weight",
    "D": "D.weight",
    "norm": "norm",
    "out_proj": "out_proj",
}
_GGUF_PARTS = {
    "ssm_in": "in_proj",
    "ssm_conv1d": "conv",
    "ssm_dt.bias": "dt.weight",
    "ssm_a": "A.weight",
    "ssm_d": "D.weight",
    "ssm_norm": "norm",
    "ssm_out": "out_proj",
}
ATTENDS = {"full_attention": True, "attention": True, "linear_attention": False, "mamba": False}
"""transformers' words for a layer, and older ones: whether it is attention or Mamba 2."""


def mamba2_names(prefix: str, name: str = "attn") -> NameTable:
    """Return transformers' tensor names, which begin with `prefix`. name: of the mixer in a block."""
    return {f"{prefix}.{theirs}": f"blk.{{i}}.{name}.{ours}" for theirs, ours in _PARTS.items()}


def gguf_mamba2_names(name: str = "attn") -> NameTable:
    """Return llama.cpp's tensor names. name: of the mixer in a block."""
    return {f"blk.{{i}}.{theirs}": f"blk.{{i}}.{name}.{ours}" for theirs, ours in _GGUF_PARTS.items()}


def check_mamba2(mixer: Mamba2, raw: RawCheckpoint) -> Mamba2:
    """Raise CheckpointError if its groups do not fit."""
    if mixer.heads % mixer.groups or mixer.inner % mixer.groups:
        raise CheckpointError(f"{raw.path}: {mixer.heads} heads cannot be {mixer.groups} groups")
    return mixer


def read_hf_mamba2(raw: RawCheckpoint, inner: int | None = None) -> Mamba2:
    """Read the fields that begin with `mamba_`. inner: its width; None for `mamba_expand` times the model's."""
    fields = fields_of(raw)
    heads = fields.count("mamba_n_heads", 128)
    if inner is None:
        inner = fields.count("mamba_expand", 2) * read_size(raw, "dim")
    size = inner // heads if fields.get("mamba_d_head") in (None, "auto") else fields.count("mamba_d_head")
    if size * heads != inner:
        raise CheckpointError(f"{fields.path}: {heads} heads do not divide a width of {inner}")
    mixer = Mamba2(
        heads=heads,
        head_dim=size,
        groups=fields.count("mamba_n_groups", 1),
        size=fields.count("mamba_d_state", 256),
        width=fields.count("mamba_d_conv", 4),
        dt_limit=read_dt_limit(fields),
    )
    return check_mamba2(mixer, raw)


def read_gguf_mamba2(raw: RawCheckpoint, **options: Any) -> Mamba2:
    """Read the keys that begin with `ssm.`. options: further fields of `Mamba2`."""
    keys = fields_of(raw)
    heads, head_dim = read_gguf_heads(keys)
    mixer = Mamba2(
        heads=heads,
        head_dim=head_dim,
        groups=keys.count("ssm.group_count"),
        size=keys.count("ssm.state_size"),
        width=keys.count("ssm.conv_kernel"),
        **options,
    )
    return check_mamba2(mixer, raw)


def read_gguf_heads(keys: Fields) -> tuple[int, int]:
    """Return the number of heads of a recurrent mixer, and their size. Raises CheckpointError if they do not fit."""
    heads, inner = keys.count("ssm.time_step_rank"), keys.count("ssm.inner_size")
    if inner % heads:
        raise CheckpointError(f"{keys.path}: {heads} heads do not divide a width of {inner}")
    return heads, inner // heads


def read_dt_limit(fields: Fields) -> tuple[float, float]:
    """transformers writes infinity, which JSON does not have, as an object."""
    limits = fields.get("time_step_limit")
    if limits is None:
        return 0.0, math.inf
    numbers = [math.inf if limit == {"__float__": "Infinity"} else limit for limit in limits]
    if len(numbers) != 2 or not all(type(number) in (int, float) for number in numbers):
        raise CheckpointError(f"{fields.path}: time_step_limit is {limits!r:.80}; it must be two numbers")
    return float(numbers[0]), float(numbers[1])


def hf_mamba2_biases(fields: Fields) -> frozenset[str]:
    """Return the layers of Mamba 2 that have a bias according to the fields that begin with `mamba_`."""
    projections = {"attn.in_proj", "attn.out_proj"} if fields.flag("mamba_proj_bias", False) else set()
    return frozenset(projections | ({"attn.conv"} if fields.flag("mamba_conv_bias", True) else set()))


def read_layer_kinds(
    fields: Fields, count: int, kinds: Iterable[str], default: list[str] | None = None, name: str = "layer_types"
) -> list[str]:
    """Read the field `name`. Raises CheckpointError unless it has one of `kinds` for each of `count` layers."""
    found, kinds = default if fields.get(name) is None else fields.get(name), list(kinds)
    if not isinstance(found, list) or len(found) != count or not all(kind in kinds for kind in found):
        raise CheckpointError(f"{fields.path}: {name} must have one of {', '.join(kinds)} for each of {count} layers")
    return found


def read_sizes(raw: RawCheckpoint, name: str) -> tuple[RawCheckpoint, list[bool]]:
    """Read a GGUF key that may have a number for each layer, 0 for a layer that lacks what it counts.

    Returns the checkpoint with one number for all, None if there is none, and whether each layer has it.
    """
    keys, count = fields_of(raw), layer_count(raw)
    sizes = keys.get(name)
    sizes = sizes[:count] if isinstance(sizes, list) else [sizes] * count
    if len(sizes) != count or not all(type(size) is int for size in sizes) or len({*sizes} - {0}) > 1:
        raise CheckpointError(f"{keys.path}: {keys.prefix}{name} must be 0 or one number for each layer")
    return raw.with_metadata({f"{keys.prefix}{name}": max(sizes) or None}), [size != 0 for size in sizes]


def with_recurrences(config: DecoderConfig, mixer: Mixer, attends: Sequence[bool]) -> DecoderConfig:
    """Replace the attention of all layers but those that attend."""
    pairs = zip(config.layers, attends, strict=True)
    return replace(config, layers=tuple(layer if kept else replace(layer, mixer=mixer) for layer, kept in pairs))


def convolution(tensor: Tensor) -> Tensor:
    """Return the weight of torch's Conv1d, (channels, 1, width), as a matrix; leave a bias unchanged."""
    return tensor.squeeze(1) if tensor.ndim == 3 else tensor


def hf_mamba2_transforms(config: DecoderConfig, name: str = "attn") -> Transforms:
    """The file has the logarithms of the decay rates."""
    return {f"{name}.A": lambda logarithms: -torch.exp(logarithms.float()), f"{name}.conv": convolution}


def gguf_mamba2_transforms(config: DecoderConfig, name: str = "attn") -> Transforms:
    """llama.cpp adds dimensions to vectors."""
    return dict.fromkeys((f"{name}.A", f"{name}.D", f"{name}.norm"), torch.flatten)
