"""Falcon-H1: attention and Mamba 2 side by side in each layer (arXiv:2507.22448), and many multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.bamba import HF_NAMES_AROUND_MAMBA
from kvgen.families.base import fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.family import GGUF_NAMES, Family, NameTable, Transform, Transforms
from kvgen.families.fields import Fields
from kvgen.families.hybrids import (
    gguf_mamba2_names,
    gguf_mamba2_transforms,
    hf_mamba2_transforms,
    mamba2_names,
    read_gguf_mamba2,
    read_hf_mamba2,
)
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import Mamba2, Parallel

_ATTENTION, _MAMBA2 = "attn.0", "attn.1"  # as `Parallel` numbers them


def _beside(names: NameTable) -> dict[str, str | None]:
    return {name: home and home.replace(".attn.", f".{_ATTENTION}.") for name, home in names.items()}


_HF_NAMES = {**_beside(HF_NAMES_AROUND_MAMBA), **mamba2_names("model.layers.{i}.mamba", _MAMBA2)}
_GGUF_NAMES = {
    **_beside(GGUF_NAMES),
    **gguf_mamba2_names(_MAMBA2),
    "blk.{i}.ffn_norm": "blk.{i}.ffn_norm.weight",  # llama.cpp leaves out `.weight`
    "blk.{i}.ffn_norm.weight": "blk.{i}.ffn_norm.weight",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        norm = "after-gate" if "blk.0.ssm_norm.weight" in raw.tensors else None
        return _with_mamba2(gguf_config(raw, names=_GGUF_NAMES), read_gguf_mamba2(raw, norm=norm))
    fields.require("hidden_act", "silu")
    inner = fields.optional_count("mamba_d_ssm") if "mamba_d_ssm" in fields.values else 1024
    mixer = read_hf_mamba2(raw, inner)
    if not fields.flag("mamba_rms_norm", False):
        mixer = replace(mixer, norm=None)
    elif fields.flag("mamba_norm_before_gate", True):
        mixer = replace(mixer, norm="before-gate")
    config = hf_config(
        raw,
        names=_HF_NAMES,
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        logit_scale=fields.number("lm_head_multiplier", 1.0),
        biases=_read_biases(raw, fields),
    )
    config = _with_mamba2(config, mixer)
    hf_multipliers(raw, config)  # to refuse what they cannot be
    return config


def _with_mamba2(config: DecoderConfig, mamba2: Mamba2) -> DecoderConfig:
    mixer = Parallel((config.attention, mamba2))
    return replace(config, layers=tuple(replace(layer, mixer=mixer) for layer in config.layers))


def _read_biases(raw: RawCheckpoint, fields: Fields) -> frozenset[str]:
    biases = {name.replace("attn.", f"{_ATTENTION}.") for name in flagged_biases(raw)}
    flags = {
        "in_proj": ("mamba_proj_bias", False),
        "conv": ("mamba_conv_bias", True),
        "out_proj": ("projectors_bias", False),
    }
    return frozenset(biases | {f"{_MAMBA2}.{part}" for part, flag in flags.items() if fields.flag(*flag)})


def hf_multipliers(raw: RawCheckpoint, config: DecoderConfig) -> Transforms:
    """Multiply weights by the factors of what they read and make, and biases by those of what they make."""
    fields, (_, mamba2) = fields_of(raw), config.mixers[:2]
    assert isinstance(mamba2, Mamba2)
    read, keys = fields.number("attention_in_multiplier", 1.0), fields.number("key_multiplier", 1.0)
    gate, down = _read_list(fields, "mlp_multipliers", 2)
    state = mamba2.groups * mamba2.size
    sizes = torch.tensor([mamba2.inner, mamba2.inner, state, state, mamba2.heads])  # z, x, B, C, dt
    projected = torch.tensor(_read_list(fields, "ssm_multipliers", 5)).repeat_interleave(sizes)
    factors: Mapping[str, float | Tensor] = {
        f"{_ATTENTION}.q.weight": read,
        f"{_ATTENTION}.k.weight": read * keys,
        f"{_ATTENTION}.k.bias": keys,
        f"{_ATTENTION}.v.weight": read,
        f"{_ATTENTION}.output": fields.number("attention_out_multiplier", 1.0),
        f"{_MAMBA2}.in_proj.weight": projected * fields.number("ssm_in_multiplier", 1.0),
        f"{_MAMBA2}.in_proj.bias": projected,
        f"{_MAMBA2}.out_proj": fields.number("ssm_out_multiplier", 1.0),
        "ffn.gate": gate,
        "ffn.down": down,
    }
    return {name: _multiply(factor) for name, factor in factors.items()}


def _multiply(factor: float | Tensor) -> Transform:
    """factor: of all rows, or of each, (rows,)."""
    rows = torch.as_tensor(factor)
    return lambda tensor: tensor.float() * rows.view(-1, *(1,) * (tensor.ndim - 1))


def _read_list(fields: Fields, name: str, count: int) -> Sequence[float]:
    numbers = fields.get(name) or [1.0] * count
    if not isinstance(numbers, list) or len(numbers) != count or not all(map(_is_finite, numbers)):
        raise CheckpointError(f"{fields.path}: {name} is {numbers!r:.80}; it must be {count} numbers")
    return [float(number) for number in numbers]


def _is_finite(number: object) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


FAMILY = Family(
    "falcon_h1",
    "falcon-h1",
    read_config,
    _HF_NAMES,
    gguf_names=_GGUF_NAMES,
    hf_transforms=lambda config: hf_mamba2_transforms(config, _MAMBA2),
    gguf_transforms=lambda config: gguf_mamba2_transforms(config, _MAMBA2),
    hf_multipliers=hf_multipliers,
)
