"""Writes a decoder as a list of operations over buffers, for the kernels to run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from kvgen.kernels.packed import PackedMatrix
from kvgen.kernels.slots import Slot
from kvgen.kernels.structs import Op, OpKind
from kvgen.model.config import DecoderConfig

ACCUMULATE, _SAME_INPUT, ROUTED, GATHER = 1, 2, 4, 8  # flags
_NORM_MODES = MappingProxyType({"rms": 0, "layer": 1})

Project = Callable[[Slot, float, int], None]
"""Writes the output of a mixer or MLP, (rows, dim), into a slot, scaled, with flags."""


class ProgramBuilder:
    """Appends operations to `ops`. Their slots are numbers of `slots`; `kept` owns what they point to."""

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, PackedMatrix | Tensor], slots: dict[Slot, int]
    ) -> None:
        """weights: packed matrices and fp32 vectors, by the decoder's parameter names. slots: grows with use."""
        self.config, self.weights, self.slots = config, weights, slots
        self.ops: list[Op] = []
        self.kept: list[Any] = []
        self._rounded: tuple[Slot, int, int, int] | None = None  # the input already rounded: slot, kind, group, flags

    def norm(self, name: str, src: Slot, dst: Slot, width: int) -> None:
        """The norm of the config, of each `width` numbers."""
        self._norm(_NORM_MODES[self.config.norm], name, src, dst, width)

    def rms_norm(self, name: str | None, src: Slot, dst: Slot, width: int) -> None:
        """RMSNorm of each `width` numbers. name: None for no weight."""
        self._norm(_NORM_MODES["rms"], name, src, dst, width)

    def linear(self, name: str, src: Slot, dst: Slot, scale: float = 1, flags: int = 0) -> None:
        matrix = self.weights[f"{name}.weight"]
        assert isinstance(matrix, PackedMatrix)
        weight = matrix.weight
        key = (src, weight.kind, weight.group, flags & GATHER)
        if self._rounded == key:
            flags |= _SAME_INPUT
        pointer, bias = ctypes.pointer(weight), self.vector(f"{name}.bias")
        self.write(OpKind.LINEAR, src, dst, scale=scale, flags=flags, weight=pointer, bias=bias)
        if weight.group and dst.buffer != src.buffer:
            self._rounded = key

    def add(self, src: Slot, dst: Slot, scale: float, flags: int) -> None:
        self.write(OpKind.ADD, src, dst, scale=scale, flags=flags)

    def vector(self, name: str) -> int | None:
        """Return the address of an fp32 parameter; None if the model does not have it."""
        found = self.weights.get(name)
        return found.data_ptr() if isinstance(found, Tensor) else None

    def write(
        self, kind: OpKind, src: Slot, dst: Slot, other: Slot | None = None, third: Slot | None = None, **fields: Any
    ) -> None:
        numbers = {"src": src, "dst": dst, "other": other, "third": third}
        self.ops.append(Op(kind=kind, **{name: self._number(slot) for name, slot in numbers.items()}, **fields))
        if self._rounded is not None and self._rounded[0].buffer == dst.buffer:
            self._rounded = None

    def _norm(self, mode: int, name: str | None, src: Slot, dst: Slot, width: int) -> None:
        weight: dict[str, Any] = {}
        if name is not None:
            vector = self.weights[f"{name}.weight"]
            assert isinstance(vector, Tensor)
            weight = {"vector": vector.data_ptr(), "vector_size": vector.numel(), "bias": self.vector(f"{name}.bias")}
        self.write(OpKind.NORM, src, dst, mode=mode, width=width, eps=self.config.norm_eps, **weight)

    def _number(self, slot: Slot | None) -> int:
        return -1 if slot is None else self.slots.setdefault(slot, len(self.slots))
