"""Gemma 3n, text: four residual streams, inputs of each layer, keys shared between layers, sparse MLPs.

Norms multiply by w, not by 1 + w as in Gemma 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import (
    fields_of,
    flagged_biases,
    gguf_config,
    hf_config,
    layer_count,
    read_activation,
    row_count,
    sliding_windows,
)
from kvgen.families.family import Family, NameTable, Transforms
from kvgen.families.fields import Fields
from kvgen.families.gemma import embedding_scale
from kvgen.families.gemma2 import NORMS
from kvgen.families.gemma3 import gguf_rotaries, hf_rotaries
from kvgen.families.shared_keys import (
    GGUF_NAMES_WITH_INPUTS,
    HF_NAMES_WITH_INPUTS,
    each_layer,
    gguf_layer_inputs,
    has_no_keys,
    with_shared_keys,
)
from kvgen.model.config import AltUp, DecoderConfig, LayerInputs
from kvgen.model.ffns import MLP, Activation, SparseMLP

_PATTERN = 5  # every fifth layer has no window
_SPARSE_LAYERS, _SPARSITY = 10, 0.95
_DEFAULTS: dict[str, Any] = {  # of transformers' Gemma3nTextConfig
    "vocab_size": 262_400,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
_HF_NAMES: NameTable = {
    **HF_NAMES_WITH_INPUTS,
    "model.altup_projections.{i}": "streams.split",
    "model.altup_unembed_projections.{i}": "streams.merge",
    "model.layers.{i}.altup.correction_coefs": "blk.{i}.altup.correct",
    "model.layers.{i}.altup.prediction_coefs": "blk.{i}.altup.predict",
    "model.layers.{i}.altup.modality_router": "blk.{i}.altup.router",
    "model.layers.{i}.altup.router_norm": "blk.{i}.altup.router_norm",
    "model.layers.{i}.altup.correct_output_scale": "blk.{i}.altup.output_scale",
    "model.layers.{i}.laurel.linear_left": "blk.{i}.laurel.left",
    "model.layers.{i}.laurel.linear_right": "blk.{i}.laurel.right",
    "model.layers.{i}.laurel.post_laurel_norm": "blk.{i}.laurel.norm",
}
_GGUF_NAMES: NameTable = {
    **GGUF_NAMES_WITH_INPUTS,
    "altup_proj": "streams.split",
    "altup_unembd_proj": "streams.merge",
    "blk.{i}.altup_correct_coef": "blk.{i}.altup.correct",
    "blk.{i}.altup_predict_coef": "blk.{i}.altup.predict",
    "blk.{i}.altup_router": "blk.{i}.altup.router",
    "blk.{i}.altup_router_norm": "blk.{i}.altup.router_norm",
    "blk.{i}.altup_correct_scale.weight": "blk.{i}.altup.output_scale",
    "blk.{i}.laurel_l": "blk.{i}.laurel.left",
    "blk.{i}.laurel_r": "blk.{i}.laurel.right",
    "blk.{i}.laurel_post_norm": "blk.{i}.laurel.norm",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _read_gguf(raw) if raw.format == "gguf" else _read_hf(raw)


def _read_hf(raw: RawCheckpoint) -> DecoderConfig:
    raw = raw.with_defaults(_DEFAULTS)
    fields = fields_of(raw)
    activation = read_activation(fields, "hidden_activation")
    inputs = fields.count("hidden_size_per_layer_input"), fields.count("vocab_size_per_layer_input")
    config = hf_config(
        raw,
        names=_HF_NAMES,
        tied_head=True,
        biases=flagged_biases(raw),
        layer_inputs=LayerInputs(*inputs, activation),
        altup=_altup(fields, "altup_num_inputs", "altup_active_idx", fields.flag("altup_correct_scale", True)),
        laurel_rank=fields.count("laurel_rank"),
        logit_softcap=fields.number("final_logit_softcapping"),
        ffns=_ffns(fields, "intermediate_size", _sparsities(fields, layer_count(raw)), activation),
        **_mechanisms(raw),
    )
    return with_shared_keys(config, fields.whole("num_kv_shared_layers"), fields.path)


def _read_gguf(raw: RawCheckpoint) -> DecoderConfig:
    keys, laurel_rank = fields_of(raw), row_count(raw, "blk.0.laurel_l.weight")
    deviations, count = keys.get("activation_sparsity_scale"), layer_count(raw)
    if not isinstance(deviations, list) or len(deviations) != count or not all(type(d) is float for d in deviations):
        raise CheckpointError(f"{keys.path}: {keys.prefix}activation_sparsity_scale must have a number for each layer")
    config = gguf_config(
        raw,
        names=_GGUF_NAMES,
        layer_inputs=gguf_layer_inputs(raw),
        altup=_altup(keys, "altup.num_inputs", "altup.active_idx", True),
        laurel_rank=laurel_rank,
        logit_softcap=keys.number("final_logit_softcapping", 30.0),
        ffns=_ffns(keys, "feed_forward_length", deviations, "gelu_tanh"),
        **_mechanisms(raw),
    )
    return with_shared_keys(config, keys.whole("attention.shared_kv_layers"), keys.path)


def _mechanisms(raw: RawCheckpoint) -> dict[str, Any]:
    windows = sliding_windows(raw, lambda layer: (layer + 1) % _PATTERN != 0)
    global_rotary, local_rotary = gguf_rotaries(raw) if raw.format == "gguf" else hf_rotaries(raw)
    return {
        "norms": NORMS,
        "windows": windows,
        "rotaries": [global_rotary if window is None else local_rotary for window in windows],
        "attention": {"qk_norm": "head", "scale": 1.0, "value_norm": True},
        "embedding_scale": embedding_scale(raw),
    }


def _ffns(fields: Fields, width: str, deviations: Sequence[float], activation: Activation) -> list[MLP | SparseMLP]:
    """width: the field of the width of all layers, or of each. deviations: see `SparseMLP`; -inf for a dense layer."""
    widths = each_layer(fields, width, len(deviations))
    mlps = [MLP(each, activation=activation) for each in widths]
    return [mlp if d == float("-inf") else SparseMLP(mlp, d) for mlp, d in zip(mlps, deviations, strict=True)]


def _sparsities(fields: Fields, count: int) -> list[float]:
    """Read the share of gates that are closed in each layer, as a number of standard deviations."""
    name = "activation_sparsity_pattern"
    sparse = _SPARSE_LAYERS if count > _SPARSE_LAYERS else 0
    shares = fields.get(name) or [_SPARSITY] * sparse + [0.0] * (count - sparse)
    if not isinstance(shares, list) or len(shares) != count or not all(_is_share(share) for share in shares):
        raise CheckpointError(f"{fields.path}: {name} must have a number of at least 0 and below 1 for each layer")
    quantiles: Tensor = torch.erfinv(2 * torch.tensor(shares, dtype=torch.float32) - 1) * math.sqrt(2)
    return list(quantiles.tolist())


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and 0 <= value < 1


def _altup(fields: Fields, count: str, active: str, output_scale: bool) -> AltUp:
    streams = fields.count(count), fields.whole(active)
    if not streams[1] < streams[0] or streams[0] == 1:
        raise CheckpointError(f"{fields.path}: cannot compute stream {streams[1]} of {streams[0]}")
    return AltUp(*streams, output_scale)


def hf_transforms(config: DecoderConfig) -> Transforms:
    """Two streams have one projection, which is not stacked."""

    def stacked(weight: Tensor) -> Tensor:
        return weight[None] if weight.ndim == 2 else weight

    return {"streams.split": stacked, "streams.merge": stacked}


FAMILY = Family(
    "gemma3n_text",
    "gemma3n",
    read_config,
    _HF_NAMES,
    gguf_names=_GGUF_NAMES,
    hf_transforms=hf_transforms,
    ignores=has_no_keys,
)
