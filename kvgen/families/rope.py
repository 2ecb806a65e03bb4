"""Rotary frequencies and the schemes that stretch them over a longer context.

All arithmetic is in fp32 as in transformers' modeling_rope_utils, so that the frequencies are bit for bit
those that the checkpoints are run with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.fields import Fields
from kvgen.model.config import Rotary


def rotary_from_hf(config: Fields, dim: int) -> Rotary:
    """From config.json: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    section = config.section("rope_parameters") or config.section("rope_scaling") or Fields({}, config.path)
    base = section.number("rope_theta", config.number("rope_theta", 10000.0))
    if base <= 1:
        raise CheckpointError(f"{config.path}: rope_theta is {base}; it must be above 1")
    frequencies = base_frequencies(dim, base)
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind == "default":
        return _rotary(frequencies)
    if kind == "linear":
        return _rotary(frequencies / section.number("factor"))
    trained = section.count("original_max_position_embeddings", config.count("max_position_embeddings"))
    if kind == "llama3":
        return _rotary(
            llama3_frequencies(
                frequencies,
                factor=section.number("factor"),
                low=section.number("low_freq_factor"),
                high=section.number("high_freq_factor"),
                trained_context=trained,
            )
        )
    if kind == "yarn":
        section.require("mscale", None)
        section.require("mscale_all_dim", None)
        section.require("truncate", True)
        factor = section.number("factor")
        stretched = yarn_frequencies(
            base,
            dim,
            factor=factor,
            trained_context=trained,
            fast=section.number("beta_fast", 32.0),
            slow=section.number("beta_slow", 1.0),
        )
        return _rotary(stretched, section.number("attention_factor", yarn_scale(factor)))
    if kind == "dynamic":
        raise UnsupportedError(
            f"{config.path}: rope type 'dynamic' changes every key's rotation as the text grows, "
            "so keys cannot be cached; kvgen does not support it"
        )
    raise UnsupportedError(f"{config.path}: rope type {kind!r} is not supported")


def rotary_from_gguf(raw: RawCheckpoint, keys: Fields, head_dim: int) -> Rotary:
    """From the `<architecture>.rope.*` keys, and the factors that llama.cpp stores as the tensor `rope_freqs`."""
    dim = keys.count("rope.dimension_count", head_dim)
    if dim != head_dim:
        raise UnsupportedError(f"{raw.path}: {keys.prefix}rope.dimension_count {dim} is not the head size {head_dim}")
    base = keys.number("rope.freq_base", 10000.0)
    if base <= 1:
        raise CheckpointError(f"{raw.path}: {keys.prefix}rope.freq_base is {base}; it must be above 1")
    for name, supported in (
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_beta_fast", 32.0),
        ("rope.scaling.yarn_beta_slow", 1.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
    ):
        keys.require(name, supported)
    frequencies = base_frequencies(dim, base)
    factors = raw.tensors.get("rope_freqs.weight")
    if factors is not None:
        if factors.shape != (dim // 2,):
            raise CheckpointError(f"{raw.path}: rope_freqs.weight has the shape {factors.shape}, not ({dim // 2},)")
        frequencies = frequencies / factors.read()
    kind = keys.get("rope.scaling.type") or ("linear" if keys.get("rope.scale_linear") else "none")
    if kind == "none":
        return _rotary(frequencies)
    if kind == "linear":
        return _rotary(frequencies / keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)))
    if kind == "yarn":
        factor = keys.number("rope.scaling.factor")
        trained = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
        stretched = yarn_frequencies(base, dim, factor=factor, trained_context=trained, fast=32.0, slow=1.0)
        return _rotary(stretched, yarn_scale(factor))
    raise UnsupportedError(f"{raw.path}: {keys.prefix}rope.scaling.type {kind!r} is not supported")


def base_frequencies(dim: int, base: float) -> Tensor:
    """base^(-2i / dim) for each pair i, (dim / 2,) fp32."""
    return 1.0 / _periods(dim, base)


def llama3_frequencies(frequencies: Tensor, *, factor: float, low: float, high: float, trained_context: int) -> Tensor:
    """Llama 3.1's scheme: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / factor
    smooth = (trained_context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    result = torch.where(wavelengths > trained_context / low, stretched, between)
    return torch.where(wavelengths < trained_context / high, frequencies, result)


def yarn_frequencies(base: float, dim: int, *, factor: float, trained_context: int, fast: float, slow: float) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp between kept and stretched frequencies."""

    def pair_of(rotations: float) -> float:
        return dim * math.log(trained_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first if last != first else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    periods = _periods(dim, base)
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept


def yarn_scale(factor: float) -> float:
    """YaRN's attention factor: 0.1 ln(factor) + 1."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _periods(dim: int, base: float) -> Tensor:
    exponents: Tensor = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return base**exponents


def _rotary(frequencies: Tensor, scale: float = 1.0) -> Rotary:
    return Rotary(tuple(frequencies.tolist()), scale)
