"""Apertus: a plain MLP with xIELU, whose slopes are learned in each layer, and norms on each head."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import (
    HF_NAMES,
    HF_QK_NORM_NAMES,
    fields_of,
    flagged_biases,
    gguf_config,
    hf_config,
    layer_count,
    read_size,
)
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, XIELU

_NUMBERS = ("alpha_p", "alpha_n", "beta", "eps")
_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.attention_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.feedforward_layernorm": "blk.{i}.ffn_norm",
    **HF_QK_NORM_NAMES,
    "model.layers.{i}.mlp.act_fn": None,  # read with the config
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        stored = [raw.metadata.get(f"xielu.{name}") for name in _NUMBERS]
    else:
        fields = fields_of(raw)
        for name, supported in (("hidden_act", "xielu"), ("post_norm", False), ("qk_norm", True)):
            fields.require(name, supported)
        stored = [[_read(raw, layer, name) for layer in range(layer_count(raw))] for name in _NUMBERS]
    width = read_size(raw, "ffn_width")
    ffns = [MLP(width, False, _slopes(*numbers)) for numbers in zip(*stored, strict=True)]
    if raw.format == "gguf":
        return gguf_config(raw, ffns=ffns, attention={"qk_norm": "head"})
    biases = flagged_biases(raw)
    return hf_config(raw, names=_HF_NAMES, ffns=ffns, attention={"qk_norm": "head"}, biases=biases)


def _read(raw: RawCheckpoint, layer: int, name: str) -> float:
    tensor = raw.tensors.get(f"model.layers.{layer}.mlp.act_fn.{name}")
    if tensor is None or tensor.shape not in ((), (1,)):
        raise CheckpointError(f"{raw.path}: the tensor model.layers.{layer}.mlp.act_fn.{name} must be one number")
    return float(tensor.read())


def _slopes(positive: float, negative: float, linear: float, limit: float) -> XIELU:
    """transformers' XIELUActivation: the slopes are learned before a softplus."""
    above, below = (F.softplus(torch.tensor(number, dtype=torch.float32)).item() for number in (positive, negative))
    return XIELU(above, linear + below, linear, limit)


FAMILY = Family("apertus", "apertus", read_config, _HF_NAMES)
