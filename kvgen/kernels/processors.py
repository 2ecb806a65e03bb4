"""The kinds of processors that the kernels are compiled for, and which of them this one is.

Imports torch only to ask for the processor's capabilities: setup.py, which runs without torch, needs the table.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from kvgen.errors import UnsupportedError, UsageError

NATIVE = "native"  # the best variant that this processor has
_MACHINES = {"amd64": "x86_64", "aarch64": "arm64"}  # other names of the same


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernels. All variants give the same bits.

    name: as in $KVGEN_CPU. machine: `x86_64` or `arm64`. flags: of g++ and clang++. needs: what a processor must have
    to run the result, as named by `torch.cpu.get_capabilities`.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def engine(self) -> str:
        """What `Backend.engine` says."""
        return f"C++ kernels ({self.name})"

    def lacking(self) -> str:
        """Return what this processor lacks of it, in words; "" if nothing."""
        if self.machine != machine():
            return f"is {machine()}, not {self.machine}"
        import torch

        capabilities = torch.cpu.get_capabilities()
        missing = [name for name in self.needs if not capabilities.get(name)]
        return f"lacks {', '.join(missing)}" if missing else ""


# The levels of https://gitlab.com/x86-psABIs/x86-64-ABI. Torch does not report MOVBE of v3, which comes with BMI2.
_V3 = ("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")
_V4 = (*_V3, "avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")

# The fastest first.
VARIANTS = (
    Variant(
        *("amx", "x86_64", ("-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8")),
        (*_V4, "avx512_vnni", "amx_tile", "amx_int8"),
    ),
    Variant("avx512-vnni", "x86_64", ("-march=x86-64-v4", "-mavx512vnni"), (*_V4, "avx512_vnni")),
    Variant("avx512", "x86_64", ("-march=x86-64-v4",), _V4),
    Variant("avx-vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), (*_V3, "avx_vnni")),
    Variant("avx2", "x86_64", ("-march=x86-64-v3",), _V3),
    Variant("neon", "arm64", ("-march=armv8.2-a+dotprod",), ("neon", "dot")),
)


def machine() -> str:
    """Return the kind of this machine: `x86_64`, `arm64` or another name of `platform.machine`."""
    name = platform.machine().lower()
    return _MACHINES.get(name, name)


def machine_variants() -> list[Variant]:
    """Return the variants for machines like this one. Raises UnsupportedError if there are none."""
    found = [variant for variant in VARIANTS if variant.machine == machine()]
    if not found:
        raise UnsupportedError(f"there are no kernels for {machine() or 'this'} processors")
    return found


def asked_variant() -> str:
    """Return the variant's name in $KVGEN_CPU; `native` if it is unset or empty."""
    return os.environ.get("KVGEN_CPU") or NATIVE


def chosen_variant() -> Variant:
    """Return the variant that $KVGEN_CPU names, or the best one.

    Raises UsageError for an unknown name, UnsupportedError if this processor does not have the variant, or none.
    """
    asked = asked_variant()
    if asked == NATIVE:
        return _best_variant()
    named = next((variant for variant in VARIANTS if variant.name == asked), None)
    if named is None:
        names = ", ".join((NATIVE, *(variant.name for variant in VARIANTS)))
        raise UsageError(f"KVGEN_CPU is {asked!r}, which is not one of {names}")
    if lacking := named.lacking():
        raise UnsupportedError(f"KVGEN_CPU is {asked!r}, but this processor {lacking}")
    return named


def _best_variant() -> Variant:
    variants = machine_variants()
    best = next((variant for variant in variants if not variant.lacking()), None)
    if best is None:
        raise UnsupportedError(f"this processor {variants[-1].lacking()}, which the kernels need")
    return best
