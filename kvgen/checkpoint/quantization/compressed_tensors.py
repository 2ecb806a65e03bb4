"""compressed-tensors, as llm-compressor stores it: weights of 4 or 8 bits, and activations as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kvgen.checkpoint.quantization.integers import (
    FP8,
    SCALE_TYPES,
    Integers,
    Parts,
    assemble,
    unpack_columns,
    unpack_rows,
)
from kvgen.checkpoint.quantization.settings import Settings
from kvgen.checkpoint.raw import RawTensor
from kvgen.errors import CheckpointError

_KINDS = {  # of numbers, by format
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}
_NUMBERS = ("weight_scale", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True)
class _Scheme:
    """How some of the matrices are stored.

    packed: several codes in an int32, or one in a byte. is_float: FP8 (E4M3), or integers. group: columns that share a
    scale; None for all. per_row: whether rows have scales of their own.
    """

    packed: bool
    is_float: bool
    bits: int
    group: int | None
    per_row: bool
    symmetric: bool


def read(settings: Settings, tensors: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Assemble the matrices of a checkpoint, each (R, K) in G groups of columns.

    weight_packed: int32, (R, K * bits / 32), or weight: a byte each, (R, K). weight_shape: R and K, if packed.
    weight_scale: floating, (R, G), or (1,). weight_zero_point, if not symmetric: int32, (R * bits / 32, G), packed
    along rows, or int8, (R, G). weight_g_idx: int32, (K,), the group of each column; only in old checkpoints.
    """
    schemes, path = _read_schemes(settings), settings.path
    packed, whole = ([scheme for scheme in schemes if scheme.packed is packed] for packed in (True, False))
    names = ("weight_packed", "weight_shape", *_NUMBERS)
    named = assemble(path, tensors, "weight_packed", names, lambda parts: _read_packed(parts, packed))
    result = assemble(path, named, "weight_scale", ("weight", *_NUMBERS), lambda parts: _read_whole(parts, whole))
    for name, tensor in result.items():
        if tensor.type == FP8 and tensor is tensors.get(name):
            raise CheckpointError(f"{path.parent}: tensor {name!r} is quantized, but has no weight_scale")
    return result


def _read_schemes(settings: Settings) -> list[_Scheme]:
    """Read the schemes. What is stored tells which of them a matrix has, so that their targets need not be matched."""
    settings.refuse("kv_cache_scheme", "quantization of the KV cache")
    settings.refuse("transform_config", "a transform of weights and activations")
    if settings.get("sparsity_config"):
        settings.section("sparsity_config").choice("format", ("dense",), "dense")
    groups = settings.section("config_groups")
    return [_read_scheme(groups.section(name), settings) for name in groups.values]


def _read_scheme(group: Settings, settings: Settings) -> _Scheme:
    group.refuse("input_activations", "quantization of activations")
    group.refuse("output_activations", "quantization of activations")
    format_name = (settings if group.get("format") is None else group).choice("format", tuple(_KINDS))
    weights = group.section("weights")
    is_float = weights.choice("type", _KINDS[format_name], "int") == "float"
    bits = weights.choice("num_bits", (8,) if is_float else (4, 8), 8)
    weights.choice("dynamic", (False,), False)
    size = weights.size("group_size", -1)
    strategies = ("tensor", "channel") if is_float else ("channel", "group")
    strategy = weights.choice("strategy", strategies, "channel" if size is None else "group")
    if (strategy == "group") != (size is not None):
        raise CheckpointError(f"{weights.shown('strategy')} is {strategy!r}, which does not fit its group_size")
    symmetric = weights.choice("symmetric", (True,) if is_float else (True, False), True)
    return _Scheme(format_name == "pack-quantized", is_float, bits, size, strategy != "tensor", symmetric)


def _read_packed(parts: Parts, schemes: Sequence[_Scheme]) -> RawTensor:
    rows, words = parts.matrix("weight_packed", ("I32",))
    parts.require("weight_shape", ("I32", "I64"), (2,))
    stored_rows, columns = map(int, parts.read("weight_shape"))
    if stored_rows != rows:
        parts.fail("weight_shape", f"says {stored_rows} rows, but weight_packed has {rows}")
    fitting = [scheme for scheme in schemes if columns > 0 and words == -(-columns * scheme.bits // 32)]
    scheme, groups = _choose(parts, "weight_packed", (rows, columns), fitting)
    bits = scheme.bits
    if not scheme.symmetric:
        parts.require("weight_zero_point", ("I32",), (-(-rows * bits // 32), groups))

    def read_integers() -> Integers:
        codes = unpack_columns(parts.read("weight_packed"), bits)[:, :columns].contiguous()
        if scheme.symmetric:
            zeros = torch.full((rows, groups), 2 ** (bits - 1))
        else:
            zeros = unpack_rows(parts.read("weight_zero_point"), bits)[:rows]
        index = parts.read_index("weight_g_idx", groups, unset=-1)
        return Integers(codes, bits, parts.read("weight_scale"), zeros, index)

    return _assembled(parts, f"pack-quantized {bits}-bit", (rows, columns), groups, read_integers)


def _read_whole(parts: Parts, schemes: Sequence[_Scheme]) -> RawTensor:
    shape = parts.matrix("weight", ("I8", FP8))
    is_float = parts.tensors["weight"].type == FP8
    fitting = [scheme for scheme in schemes if scheme.is_float == is_float]
    scheme, groups = _choose(parts, "weight", shape, fitting)
    if is_float:
        return parts.assembled("FP8", shape, lambda: parts.read("weight").float() * parts.read("weight_scale").float())
    if not scheme.symmetric:
        parts.require("weight_zero_point", ("I8",), (shape[0], groups))

    def read_integers() -> Integers:
        codes = parts.read("weight").view(torch.uint8) ^ 128  # from signed to unsigned
        signed = torch.zeros(shape[0], groups) if scheme.symmetric else parts.read("weight_zero_point").int()
        index = parts.read_index("weight_g_idx", groups, unset=-1)
        return Integers(codes, 8, parts.read("weight_scale"), signed + 128, index)

    return _assembled(parts, "int-quantized 8-bit", shape, groups, read_integers)


def _assembled(parts: Parts, kind: str, shape: tuple[int, int], groups: int, read: Callable[[], Integers]) -> RawTensor:
    indexed = "weight_g_idx" in parts.tensors
    if indexed:
        parts.require("weight_g_idx", ("I32",), (shape[1],))
    return parts.assembled_integers(kind, shape, groups, read, shuffled=indexed and groups > 1)


def _choose(parts: Parts, part: str, shape: tuple[int, int], schemes: Sequence[_Scheme]) -> tuple[_Scheme, int]:
    """Return the scheme of an (R, K) matrix, and its number of groups. Raises CheckpointError if none fits."""
    rows, columns = shape
    scales = parts.shape("weight_scale", SCALE_TYPES)
    for scheme in schemes:
        group = scheme.group or columns
        groups = columns // group
        fits = scales == (rows, groups) if scheme.per_row else scales in ((1,), ())
        has_zeros = "weight_zero_point" in parts.tensors
        if fits and columns % group == 0 and has_zeros != scheme.symmetric:
            return scheme, groups
    return parts.fail(part, f"of shape {shape} with scales of shape {scales} fits no scheme in config_groups")
