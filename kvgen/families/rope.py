"""Rotary frequencies, and the schemes that scale them to longer contexts.

All arithmetic is in fp32, as in transformers' modeling_rope_utils: the frequencies are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.fields import Fields
from kvgen.model.mixers import Rotary

_MAX_HEAD_DIM = 1 << 16  # 100 times the largest in use


def rotary_from_hf(
    config: Fields, head_dim: int, *, default_share: float = 1.0, default_base: float = 10000.0
) -> Rotary:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before), from config.json.

    default_share: share of a head's dimensions that is rotated, and default_base: rope_theta, if the file has none.
    """
    section = config.section("rope_parameters") or config.section("rope_scaling") or Fields({}, config.path)
    share = section.number("partial_rotary_factor", config.number("partial_rotary_factor", default_share))
    dim = _check_dim(config, int(head_dim * share), head_dim)
    base = _check_base(config, "rope_theta", section.number("rope_theta", config.number("rope_theta", default_base)))
    scheme = section.get("rope_type") or section.get("type") or "default"
    if scheme == "dynamic":
        raise UnsupportedError(
            f"{config.path}: rope type 'dynamic' changes every key's rotation as the text grows, "
            "so keys cannot be cached; kvgen does not support it"
        )
    if not isinstance(scheme, str) or scheme not in _HF_SCHEMES:
        raise UnsupportedError(f"{config.path}: rope type {scheme!r} is not supported")
    return _HF_SCHEMES[scheme](config, section, dim, base)


def _default(config: Fields, section: Fields, dim: int, base: float) -> Rotary:
    return _rotary(base_frequencies(dim, base))


def _linear(config: Fields, section: Fields, dim: int, base: float) -> Rotary:
    return _rotary(base_frequencies(dim, base) / section.number("factor"))


def _llama3(config: Fields, section: Fields, dim: int, base: float) -> Rotary:
    """Llama 3.1: divide low frequencies by `factor`, keep high ones, interpolate between."""
    frequencies, factor = base_frequencies(dim, base), section.number("factor")
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    trained = _trained_context(config, section)
    wavelengths = 2 * math.pi / frequencies
    smooth = (trained / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > trained / low, frequencies / factor, between)
    return _rotary(torch.where(wavelengths < trained / high, frequencies, scaled))


def _yarn(config: Fields, section: Fields, dim: int, base: float) -> Rotary:
    factor, trained = section.number("factor"), _trained_context(config, section)
    fast, slow = section.number("beta_fast", 32.0), section.number("beta_slow", 1.0)
    whole = section.flag("truncate", True)
    frequencies = yarn_frequencies(
        base, dim, factor=factor, trained_context=trained, fast=fast, slow=slow, whole_pairs=whole
    )
    scale = yarn_scale(factor)
    if section.get("mscale") and section.get("mscale_all_dim"):
        scale = yarn_scale(factor, section.number("mscale")) / yarn_scale(factor, section.number("mscale_all_dim"))
    return _rotary(frequencies, section.number("attention_factor", scale))


def _longrope(config: Fields, section: Fields, dim: int, base: float) -> Rotary:
    trained = _trained_context(config, section)
    short, long = (_read_factors(section, name, dim // 2) for name in ("short_factor", "long_factor"))
    factor = section.number("factor", config.count("max_position_embeddings") / trained)
    scale = section.number("attention_factor", longrope_scale(factor, trained))
    return longrope(base, dim, short=short, long=long, trained_context=trained, scale=scale)


_HF_SCHEMES: Mapping[str, Callable[[Fields, Fields, int, float], Rotary]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rotary_from_gguf(raw: RawCheckpoint, keys: Fields, head_dim: int, *, whole_pairs: bool = True) -> Rotary:
    """Read the `<architecture>.rope.*` keys, and the factors that llama.cpp stores as tensors.

    whole_pairs: see `yarn_frequencies`.
    """
    dim = _check_dim(keys, keys.count("rope.dimension_count", head_dim), head_dim)
    base = _check_base(keys, f"{keys.prefix}rope.freq_base", keys.number("rope.freq_base", 10000.0))
    keys.require("rope.scaling.yarn_ext_factor", 1.0)
    short, long = (_stored_factors(raw, f"rope_factors_{length}.weight", dim // 2) for length in ("short", "long"))
    if short is not None and long is not None:
        trained = keys.count("rope.scaling.original_context_length")
        factor = keys.count("context_length") / trained
        scale = keys.number("rope.scaling.attn_factor", longrope_scale(factor, trained))
        return longrope(base, dim, short=short, long=long, trained_context=trained, scale=scale)
    keys.require("rope.scaling.attn_factor", 1.0)
    frequencies = base_frequencies(dim, base)
    factors = _stored_factors(raw, "rope_freqs.weight", dim // 2)
    if factors is not None:
        frequencies = frequencies / factors
    scheme = keys.get("rope.scaling.type") or ("linear" if keys.get("rope.scale_linear") else "none")
    if scheme == "none":
        return _rotary(frequencies)
    if scheme == "linear":
        return _rotary(frequencies / keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)))
    if scheme == "yarn":
        return _gguf_yarn(keys, base, dim, whole_pairs)
    raise UnsupportedError(f"{raw.path}: {keys.prefix}rope.scaling.type {scheme!r} is not supported")


def _gguf_yarn(keys: Fields, base: float, dim: int, whole_pairs: bool) -> Rotary:
    factor, name = keys.number("rope.scaling.factor"), "rope.scaling.yarn_attn_factor"
    frequencies = yarn_frequencies(
        base,
        dim,
        factor=factor,
        trained_context=keys.count("rope.scaling.original_context_length", keys.count("context_length")),
        fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        whole_pairs=whole_pairs,
    )
    scale = yarn_scale(factor)
    # Converted from `attention_factor`, which replaces the scale, or `attn_factor`, which multiplies it.
    if not math.isclose(keys.number(name, scale), scale, rel_tol=1e-5):
        raise UnsupportedError(f"{keys.path}: {keys.prefix}{name} is {keys.get(name)}; kvgen supports {scale:.6g}")
    return _rotary(frequencies, scale)


def plain_rotary(fields: Fields, head_dim: int, base: float) -> Rotary:
    """Rotate whole heads, without scaling."""
    return _rotary(base_frequencies(_check_dim(fields, head_dim, head_dim), _check_base(fields, "rotary base", base)))


def base_frequencies(dim: int, base: float) -> Tensor:
    """Return base^(-2i / dim) for each pair i, (dim / 2,) fp32."""
    return 1.0 / _periods(dim, base)


def yarn_frequencies(
    base: float, dim: int, *, factor: float, trained_context: int, fast: float, slow: float, whole_pairs: bool = True
) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a linear ramp between kept and scaled frequencies.

    whole_pairs: the ramp begins and ends at pairs of dimensions, rounded outwards, not between two.
    """

    def pair_of(rotations: float) -> float:
        return dim * math.log(trained_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(fast), pair_of(slow)
    if whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first if last != first else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    periods = _periods(dim, base)
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention factor: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope(base: float, dim: int, *, short: Tensor, long: Tensor, trained_context: int, scale: float) -> Rotary:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor per pair; `long` ones beyond the trained context."""
    frequencies = [1.0 / (factors * _periods(dim, base)) for factors in (short, long)]
    return Rotary(tuple(frequencies[0].tolist()), scale, tuple(frequencies[1].tolist()), trained_context)


def longrope_scale(factor: float, trained_context: int) -> float:
    """LongRoPE's attention factor: sqrt(1 + ln(factor) / ln(trained context))."""
    return math.sqrt(1 + math.log(factor) / math.log(trained_context)) if factor > 1 else 1.0


def _trained_context(config: Fields, section: Fields) -> int:
    """As in transformers, a value in the config takes precedence over one in the section."""
    inside = section.count("original_max_position_embeddings", config.count("max_position_embeddings"))
    return config.count("original_max_position_embeddings", inside)


def _read_factors(section: Fields, name: str, count: int) -> Tensor:
    values = section.get(name)
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and v > 0 for v in values):
        raise CheckpointError(f"{section.path}: {name} must be a list of positive numbers")
    return _check_length(torch.tensor(values, dtype=torch.float32), count, f"{section.path}: {name}")


def _stored_factors(raw: RawCheckpoint, name: str, count: int) -> Tensor | None:
    tensor = raw.tensors.get(name)
    return None if tensor is None else _check_length(tensor.read(), count, f"{raw.path}: {name}")


def _check_length(factors: Tensor, count: int, where: str) -> Tensor:
    if factors.shape != (count,):
        raise CheckpointError(f"{where} has the shape {tuple(factors.shape)}, not ({count},)")
    return factors.float()


def _check_base(fields: Fields, name: str, base: float) -> float:
    if base <= 1:
        raise CheckpointError(f"{fields.path}: {name} is {base}; it must be above 1")
    return base


def _check_dim(fields: Fields, dim: int, head_dim: int) -> int:
    if dim % 2 or not 0 < dim <= min(head_dim, _MAX_HEAD_DIM):
        raise CheckpointError(
            f"{fields.path}: rotary positions need an even number of dimensions, "
            f"but the config rotates {dim} of the {head_dim} dimensions of a head"
        )
    return dim


def _periods(dim: int, base: float) -> Tensor:
    exponents: Tensor = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return base**exponents


def _rotary(frequencies: Tensor, scale: float = 1.0) -> Rotary:
    return Rotary(tuple(frequencies.tolist()), scale)
