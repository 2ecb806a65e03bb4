"""gpt-oss: mixtures of experts with biases and clamped SwiGLU, attention sinks, a window in every second layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import ATTENTION, HF_NAMES, fields_of, gguf_config, head_dim, hf_config, sliding_windows
from kvgen.families.experts import gguf_ffns, hf_ffns
from kvgen.families.family import GGUF_NORM_NAMES, Family, Transforms
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import ClampedSwiGLU, Router

_ALPHA, _LIMIT = 1.702, 7.0
_BIASES = frozenset({"ffn.router", "ffn.experts.gate", "ffn.experts.up", "ffn.experts.down"})
_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.self_attn.sinks": "blk.{i}.attn.sinks.weight",
    "model.layers.{i}.mlp.router": "blk.{i}.ffn.router",
    "model.layers.{i}.mlp.experts.gate_up_proj": "blk.{i}.ffn.experts.gate_up.weight",
    "model.layers.{i}.mlp.experts.gate_up_proj_bias": "blk.{i}.ffn.experts.gate_up.bias",
    "model.layers.{i}.mlp.experts.down_proj": "blk.{i}.ffn.experts.down.weight",
    "model.layers.{i}.mlp.experts.down_proj_bias": "blk.{i}.ffn.experts.down.bias",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    windows = sliding_windows(raw, lambda layer: layer % 2 == 0)
    mechanisms: dict[str, Any] = {"windows": windows, "attention": {"sinks": True}}
    return _read_gguf(raw, mechanisms) if raw.format == "gguf" else _read_hf(raw, mechanisms)


def _read_hf(raw: RawCheckpoint, mechanisms: dict[str, Any]) -> DecoderConfig:
    fields = fields_of(raw)
    fields.require("hidden_act", "silu")
    if not (fields.section("rope_parameters") or fields.section("rope_scaling")):
        raise CheckpointError(f"{fields.path}: rope_parameters is missing")
    router = Router(fields.count("num_local_experts"), fields.count("num_experts_per_tok"), scores="softmax_of_chosen")
    activation = ClampedSwiGLU(fields.number("swiglu_alpha", _ALPHA), fields.number("swiglu_limit", _LIMIT))
    attention = ATTENTION if fields.flag("attention_bias", True) else frozenset()
    return hf_config(
        raw,
        names=_HF_NAMES,
        rotaries=rotary_from_hf(fields, fields.count("head_dim"), default_base=150000.0),
        ffns=hf_ffns(raw, router, width="intermediate_size", activation=activation),
        biases=attention | _BIASES,
        **mechanisms,
    )


def _read_gguf(raw: RawCheckpoint, mechanisms: dict[str, Any]) -> DecoderConfig:
    """The model was trained with YaRN's ramp between pairs; the file cannot say so, and llama.cpp rounds it."""
    activation = ClampedSwiGLU(_ALPHA, _LIMIT)
    return gguf_config(
        raw,
        names=GGUF_NORM_NAMES,
        rotaries=rotary_from_gguf(raw, fields_of(raw), head_dim(raw), whole_pairs=False),
        ffns=gguf_ffns(raw, scores="softmax_of_chosen", normalize=False, activation=activation),
        biases=_BIASES,
        **mechanisms,
    )


def hf_transforms(config: DecoderConfig) -> Transforms:
    """Experts are stored as (E, in, out), with gate and up in turns; their biases as (E, out)."""
    return {"ffn.experts.gate_up": _gates_first, "ffn.experts.down.weight": _rows_first}


def _rows_first(weights: Tensor) -> Tensor:
    """Transpose (E, in, out) to (E, out, in)."""
    return weights.transpose(1, 2).contiguous()


def _gates_first(tensor: Tensor) -> Tensor:
    """Return weights as (E, out, in), or biases as (E, out), where all of the gate come before all of up."""
    rows = tensor.transpose(1, 2) if tensor.ndim == 3 else tensor
    return torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1)


FAMILY = Family("gpt_oss", "gpt-oss", read_config, _HF_NAMES, gguf_names=GGUF_NORM_NAMES, hf_transforms=hf_transforms)
