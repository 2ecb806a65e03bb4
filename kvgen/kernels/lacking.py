"""What the kernels lack of a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from kvgen.kernels.ffns import ACTIVATIONS
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.ffns import MLP, XIELU, ClampedSwiGLU, MLPAndExperts, MoE, Router, SparseMLP
from kvgen.model.mixers import (
    Attention,
    DeltaNet,
    LatentAttention,
    Mamba,
    Mamba2,
    Parallel,
    Rotary,
    SharedAttention,
    ShortConv,
)

# The kernels implement all fields of these, and of `DecoderConfig` all but the named ones.
_IMPLEMENTED = (Attention, ShortConv, Mamba2, DeltaNet, Parallel, Rotary, MLP, MoE, Router, Layer)
_LACKING = frozenset({"layer_inputs", "altup", "laurel_rank", "block_scales"})
_WORDS: Mapping[type, str] = MappingProxyType(
    {
        LatentAttention: "latent attention",
        SharedAttention: "keys and values shared between layers",
        Mamba: "Mamba",
        MLPAndExperts: "experts beside MLPs",
        SparseMLP: "sparse MLPs",
    }
)


def lacking(config: DecoderConfig) -> str | None:
    """Return the mechanisms of a decoder that the kernels lack, in words; None if they have them all."""
    return ", ".join(dict.fromkeys(_lacking(config))) or None


def _lacking(config: DecoderConfig) -> Iterator[str]:
    parts: list[Any] = [part for layer in config.layers for part in (layer.mixer, *layer.mixers, layer.ffn)]
    for part in parts:
        if part is not None and type(part) not in _IMPLEMENTED:
            yield _WORDS[type(part)]
    mixtures = [part for part in parts if isinstance(part, MoE)]
    experts = [mlp for mixture in mixtures for mlp in (mixture.expert, mixture.shared)]
    for mlp in (*parts, *experts):
        if isinstance(mlp, MLP) and not _computes(mlp):
            yield f"the activation {mlp.activation}"
    for field in fields(config):
        if field.name in _LACKING and getattr(config, field.name) != field.default:
            yield field.name.replace("_", " ")


def _computes(mlp: MLP) -> bool:
    return isinstance(mlp.activation, XIELU | ClampedSwiGLU) or mlp.activation in ACTIVATIONS
