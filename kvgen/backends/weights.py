"""From a checkpoint's tensors to the parameters of the native decoder, as they are to be computed with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvgen.backends.blueprint import Blueprint
from kvgen.backends.compute import ComputeOptions
from kvgen.checkpoint import RawCheckpoint
from kvgen.checkpoint.grouped import Grouped, quantized
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.family import block_part, parts_of, take_apart
from kvgen.kernels.packed import PackedMatrix
from kvgen.model.layers import Linear
from kvgen.system import total_memory


class WeightReader:
    """Reads the tensors of a checkpoint as the decoder's parameters."""

    def __init__(self, raw: RawCheckpoint, blueprint: Blueprint, arithmetic: ComputeOptions) -> None:
        self.raw, self.sources, self.arithmetic = raw, blueprint.sources, arithmetic
        self.config = blueprint.decoder.config
        self.shapes = {name: tuple(parameter.shape) for name, parameter in blueprint.decoder.named_parameters()}
        self.transforms = blueprint.family.transforms(raw, self.config)
        linear = (name for name, module in blueprint.decoder.named_modules() if isinstance(module, Linear))
        self.matrices = {f"{name}.weight" for name in (*linear, "token_embd")}

    def check_memory(self) -> None:
        """Raises UnsupportedError if the weights cannot fit into the machine's memory."""
        needed, there = sum(map(self._bytes_of, self.sources)), total_memory()
        if self.arithmetic.device.type == "cpu" and needed > there:
            raise UnsupportedError(
                f"{self.raw.path}: its weights take {needed / 1e9:.1f} GB as they are to be computed with, and this "
                f"machine has {there / 1e9:.1f} GB; fewer bits take less: --quantize int4, --dtype bfloat16"
            )

    def _bytes_of(self, source: str) -> int:
        """What a source takes in memory, at most."""
        stored = sum(self.raw.tensors[name].nbytes for name in self.sources[source])
        numbers = sum(math.prod(self.shapes[name]) for name in parts_of(source))
        if not self.arithmetic.kernels:
            return numbers * self.arithmetic.dtype.itemsize
        return {"auto": stored, "none": 4 * numbers}.get(self.arithmetic.quantize, numbers)

    def read(self, source: str) -> list[tuple[str, Any]]:
        """The parameters that a source holds, by name: ready for the decoder, on torch or on the kernels."""
        names = self.sources[source]
        where = f"{self.raw.path}: tensor {names[0]!r}"
        try:
            pieces: Sequence[Tensor | Grouped] = self._as_integers(source) or self._as_floats(source)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{where} does not fit the config ({error})") from error
        placed = []
        for name, piece in zip(parts_of(source), pieces, strict=True):
            if tuple(piece.shape) != self.shapes[name]:
                raise CheckpointError(f"{where} has the shape {tuple(piece.shape)}, not {self.shapes[name]}")
            placed.append((name, self._placed(name, piece)))
        kept = {piece.data_ptr() for _, piece in placed if isinstance(piece, Tensor)}
        if kept.isdisjoint(piece.data_ptr() for piece in pieces if isinstance(piece, Tensor)):
            for name in names:
                self.raw.tensors[name].release()
        return placed

    def _as_integers(self, source: str) -> list[Grouped] | None:
        """The pieces of a source as the integers that it is stored in; None if that cannot be or is not wanted."""
        names = self.sources[source]
        if self.arithmetic.quantize == "none" or not self.arithmetic.kernels or len(names) > 1:
            return None
        if not self.matrices.issuperset(parts_of(source)):
            return None
        grouped = self.raw.tensors[names[0]].read_grouped()
        if grouped is None:
            return None
        transform = self.transforms.get(block_part(source))
        index = torch.arange(grouped.shape[0], dtype=torch.float64)[:, None]
        moved = transform(index) if transform else index
        if moved.shape != index.shape or not torch.equal(moved.sort(0).values, index):
            return None  # it does more than to order rows
        pieces = take_apart(moved, source, self.config)
        return (
            [grouped] if len(pieces) == 1 and not transform else [grouped.rows(piece[:, 0].long()) for piece in pieces]
        )

    def _as_floats(self, source: str) -> list[Tensor]:
        tensors = [_read_floats(self.raw, name) for name in self.sources[source]]
        tensor = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
        transform = self.transforms.get(block_part(source))
        return take_apart(transform(tensor) if transform else tensor, source, self.config)

    def _placed(self, name: str, piece: Tensor | Grouped) -> Tensor | PackedMatrix:
        arithmetic = self.arithmetic
        if name in self.matrices and isinstance(piece, Tensor) and arithmetic.quantize in ("int8", "int4"):
            piece = _rounded(piece, 4 if arithmetic.quantize == "int4" and block_part(name) != name else 8)
        if arithmetic.kernels and name in self.matrices:
            return PackedMatrix(piece)
        floats = piece.dequantized() if isinstance(piece, Grouped) else piece
        return floats.to(device=arithmetic.device, dtype=arithmetic.dtype)


def _rounded(matrix: Tensor, bits: int) -> Tensor | Grouped:
    """Of `bits` bits, if its rows divide into groups."""
    return matrix if matrix.shape[1] % 32 else quantized(matrix, bits)


def _read_floats(raw: RawCheckpoint, name: str) -> Tensor:
    tensor = raw.tensors[name].read()
    if not tensor.is_floating_point():
        raise UnsupportedError(f"{raw.path}: tensor {name!r} has the type {raw.tensors[name].type}")
    return tensor
