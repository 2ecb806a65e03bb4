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

_MOST_DIMENSIONS = 1 << 16  # of a head; none in use has a hundredth of it


def rotary_from_hf(
    config: Fields, head_dim: int, *, default_share: float = 1.0, default_base: float = 10000.0
) -> Rotary:
    """From config.json: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).

    default_share: of a head that is rotated, and default_base, where the file does not say.
    """
    section = config.section("rope_parameters") or config.section("rope_scaling") or Fields({}, config.path)
    share = section.number("partial_rotary_factor", config.number("partial_rotary_factor", default_share))
    dim = _even(config, int(head_dim * share), head_dim)
    base = _base(config, "rope_theta", section.number("rope_theta", config.number("rope_theta", default_base)))
    frequencies = base_frequencies(dim, base)
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind == "default":
        return _rotary(frequencies)
    if kind == "linear":
        return _rotary(frequencies / section.number("factor"))
    trained = _trained_context(config, section)
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
    if kind == "longrope":
        factor = section.number("factor", config.count("max_position_embeddings") / trained)
        return longrope(
            base,
            dim,
            short=_factors(section, "short_factor", dim // 2),
            long=_factors(section, "long_factor", dim // 2),
            trained_context=trained,
            scale=section.number("attention_factor", longrope_scale(factor, trained)),
        )
    if kind == "dynamic":
        raise UnsupportedError(
            f"{config.path}: rope type 'dynamic' changes every key's rotation as the text grows, "
            "so keys cannot be cached; kvgen does not support it"
        )
    raise UnsupportedError(f"{config.path}: rope type {kind!r} is not supported")


def rotary_from_gguf(raw: RawCheckpoint, keys: Fields, head_dim: int) -> Rotary:
    """From the `<architecture>.rope.*` keys, and the factors that llama.cpp stores as tensors."""
    dim = _even(keys, keys.count("rope.dimension_count", head_dim), head_dim)
    base = _base(keys, f"{keys.prefix}rope.freq_base", keys.number("rope.freq_base", 10000.0))
    for name, supported in (
        ("rope.scaling.yarn_beta_fast", 32.0),
        ("rope.scaling.yarn_beta_slow", 1.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
    ):
        keys.require(name, supported)
    short, long = (_gguf_factors(raw, f"rope_factors_{length}.weight", dim // 2) for length in ("short", "long"))
    if short is not None and long is not None:
        trained = keys.count("rope.scaling.original_context_length")
        factor = keys.count("context_length") / trained
        scale = keys.number("rope.scaling.attn_factor", longrope_scale(factor, trained))
        return longrope(base, dim, short=short, long=long, trained_context=trained, scale=scale)
    keys.require("rope.scaling.attn_factor", 1.0)
    frequencies = base_frequencies(dim, base)
    factors = _gguf_factors(raw, "rope_freqs.weight", dim // 2)
    if factors is not None:
        frequencies = frequencies / factors
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


def plain_rotary(fields: Fields, head_dim: int, base: float) -> Rotary:
    """Whole heads, nothing stretched."""
    return _rotary(base_frequencies(_even(fields, head_dim, head_dim), _base(fields, "rotary base", base)))


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


def longrope(base: float, dim: int, *, short: Tensor, long: Tensor, trained_context: int, scale: float) -> Rotary:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor for each pair, others for texts beyond the trained."""
    frequencies = [1.0 / (factors * _periods(dim, base)) for factors in (short, long)]
    return Rotary(tuple(frequencies[0].tolist()), scale, tuple(frequencies[1].tolist()), trained_context)


def longrope_scale(factor: float, trained_context: int) -> float:
    """LongRoPE's attention factor: sqrt(1 + ln(factor) / ln(trained context))."""
    return math.sqrt(1 + math.log(factor) / math.log(trained_context)) if factor > 1 else 1.0


def _trained_context(config: Fields, section: Fields) -> int:
    """A value beside the section stands above one inside it, as in transformers."""
    inside = section.count("original_max_position_embeddings", config.count("max_position_embeddings"))
    return config.count("original_max_position_embeddings", inside)


def _factors(section: Fields, name: str, count: int) -> Tensor:
    values = section.get(name)
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and v > 0 for v in values):
        raise CheckpointError(f"{section.path}: {name} must be a list of positive numbers")
    return _of_length(torch.tensor(values, dtype=torch.float32), count, f"{section.path}: {name}")


def _gguf_factors(raw: RawCheckpoint, name: str, count: int) -> Tensor | None:
    tensor = raw.tensors.get(name)
    return None if tensor is None else _of_length(tensor.read(), count, f"{raw.path}: {name}")


def _of_length(factors: Tensor, count: int, where: str) -> Tensor:
    if factors.shape != (count,):
        raise CheckpointError(f"{where} has the shape {tuple(factors.shape)}, not ({count},)")
    return factors.float()


def _base(fields: Fields, name: str, base: float) -> float:
    if base <= 1:
        raise CheckpointError(f"{fields.path}: {name} is {base}; it must be above 1")
    return base


def _even(fields: Fields, dim: int, head_dim: int) -> int:
    if dim % 2 or not 0 < dim <= min(head_dim, _MOST_DIMENSIONS):
        raise CheckpointError(
            f"{fields.path}: rotary positions need pairs, and cannot turn {dim} of the {head_dim} dimensions of a head"
        )
    return dim


def _periods(dim: int, base: float) -> Tensor:
    exponents: Tensor = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return base**exponents


def _rotary(frequencies: Tensor, scale: float = 1.0) -> Rotary:
    return Rotary(tuple(frequencies.tolist()), scale)
