"""GPTQ (arXiv:2210.17323), as AutoGPTQ and GPTQModel store it."""

from __future__ import annotations

from collections.abc import Mapping

from kvgen.checkpoint.quantization.integers import SCALE_TYPES, Integers, Parts, assemble, unpack_columns, unpack_rows
from kvgen.checkpoint.quantization.settings import Settings
from kvgen.checkpoint.raw import RawTensor
from kvgen.errors import UnsupportedError

# A one for each code of a word. They are added to whole words, since GPTQModel subtracts them so, and may borrow.
_ONES = {4: 0x11111111, 8: 0x01010101}


def read(settings: Settings, tensors: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Assemble the matrices of a checkpoint, each (R, K) in G groups of columns.

    qweight: int32, (K * bits / 32, R), packed along columns. scales: floating, (G, R). qzeros: int32,
    (G, R * bits / 32), packed along rows; in format `gptq` less 1 each. g_idx: int32, (K,), the group of each column,
    which may be missing; with act-order (`desc_act`) the columns of a group are not adjacent.
    """
    bits = settings.choice("bits", (4, 8))
    group_size = settings.size("group_size", -1)
    format_field = "checkpoint_format" if settings.get("checkpoint_format") is not None else "format"
    format_name = settings.choice(format_field, ("gptq", "gptq_v2"), "gptq")
    act_order = settings.choice("desc_act", (False, True), False)
    settings.choice("pack_dtype", ("int32",), "int32")
    settings.refuse("is_marlin_format", "the Marlin layout")
    settings.refuse("rotation", "a rotation")
    settings.refuse("adapter", "an adapter")
    _refuse_overrides(settings)

    def assembled(parts: Parts) -> RawTensor:
        words, rows = parts.matrix("qweight", ("I32",))
        columns = words * 32 // bits
        groups = parts.count_groups("qweight", columns, group_size)
        parts.require("scales", SCALE_TYPES, (groups, rows))
        parts.require("qzeros", ("I32",), (groups, -(-rows * bits // 32)))
        if "g_idx" in parts.tensors:
            parts.require("g_idx", ("I32",), (columns,))

        def read_integers() -> Integers:
            zeros = parts.read("qzeros")
            if format_name == "gptq":
                zeros = zeros + _ONES[bits]
            return Integers(
                unpack_columns(parts.read("qweight").T, bits),
                bits,
                parts.read("scales").T,
                unpack_rows(zeros.T, bits)[:rows],
                # Some tools write zeros where columns are in order.
                parts.read_index("g_idx", groups, unset=None if act_order else 0),
            )

        shuffled = act_order and groups > 1 and "g_idx" in parts.tensors
        return parts.assembled_integers(f"GPTQ {bits}-bit", (rows, columns), groups, read_integers, shuffled=shuffled)

    return assemble(settings.path, tensors, "qweight", ("qweight", "qzeros", "scales", "g_idx"), assembled)


def _refuse_overrides(settings: Settings) -> None:
    """Raise UnsupportedError if some matrices have settings of their own; those left out (`-:`) are stored plain."""
    overrides = settings.get("dynamic") or {}
    if not isinstance(overrides, Mapping) or not all(str(pattern).startswith("-:") for pattern in overrides):
        raise UnsupportedError(f"{settings.shown('dynamic')}: settings for single matrices are not supported")
