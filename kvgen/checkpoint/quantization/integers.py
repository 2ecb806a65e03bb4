"""Matrices of integer codes, and the tensors that store them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from kvgen.checkpoint.grouped import Grouped
from kvgen.checkpoint.raw import RawTensor, refuse_tensor

FP8 = "F8_E4M3"  # in safetensors
SCALE_TYPES = ("F16", "BF16", "F32")
_GROUPS = (32, 16)  # columns per group of `Grouped`, the best first


@dataclass(frozen=True)
class Integers:
    """An (R, K) matrix of unsigned codes, whose columns are in G groups: weight = (code - zero) * scale.

    codes: uint8, (R, K). bits: of a code, 4 or 8. scales: floating, (R, G). zeros: integers, (R, G).
    index: the group of each column, (K,) int64; None if each group is K / G adjacent columns.
    """

    codes: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor
    index: Tensor | None = None

    def dequantized(self) -> Tensor:
        """Return the weights, (R, K) fp32."""
        scales, zeros = self.scales.float(), self.zeros.float()
        if self.index is not None:
            return self.codes.float().sub_(zeros[:, self.index]).mul_(scales[:, self.index])
        groups = self.codes.view(*scales.shape, -1).float()  # (R, G, K / G)
        return groups.sub_(zeros[..., None]).mul_(scales[..., None]).view(self.codes.shape)

    def grouped(self) -> Grouped | None:
        """Return the same weights as a `Grouped` matrix; None if its groups do not divide these."""
        (rows, columns), groups = self.codes.shape, self.scales.shape[1]
        group = best_group(columns, groups)
        if self.index is not None or group is None:
            return None
        offset = 0 if self.bits == 4 else 128  # from the codes of `Grouped`, which are signed if they have 8 bits
        scales = self.scales.float()
        mins = (offset - self.zeros.float()) * scales  # exact for scales of 16 bits
        if self.bits == 4:
            low, high = self.codes.view(rows, -1, 2, group // 2).unbind(2)
            codes = (low | high << 4).view(rows, -1)
        else:
            codes = (self.codes ^ 128).view(torch.int8)
        repeats = columns // groups // group
        numbers = [_narrowed(part).repeat_interleave(repeats, dim=1) for part in (scales, mins)]
        return Grouped(codes, numbers[0], numbers[1] if mins.any() else None, group)


def best_group(columns: int, groups: int) -> int | None:
    """Return the columns per group of `Grouped` that divide groups of K / G columns; None if there are none."""
    return next((group for group in _GROUPS if columns % (groups * group) == 0), None)


def _narrowed(numbers: Tensor) -> Tensor:
    """Return fp32 as fp16 if that is exact."""
    half = numbers.half()
    return half if torch.equal(half.float(), numbers) else numbers


def _bytes_of(words: Tensor) -> Tensor:
    """View int32 as bytes, the lowest first: (R, n) to (R, n, 4) uint8."""
    return words.reshape(-1).view(torch.uint8).view(*words.shape, 4)


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """Unpack codes along rows, lowest bits first: (R, n) int32 to (R, n * 32 / bits) uint8."""
    packed = _bytes_of(words)
    return packed.flatten(1) if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def unpack_rows(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Unpack codes along columns: (n, K) int32 to (n * 32 / bits, K) uint8. order: which code of a word is which."""
    packed = _bytes_of(words).unbind(-1)
    codes = packed if bits == 8 else [half for byte in packed for half in (byte & 15, byte >> 4)]
    return torch.stack([codes[i] for i in order or range(len(codes))], dim=1).flatten(0, 1)


class Parts:
    """The tensors that store one matrix, by the last parts of their names."""

    def __init__(self, path: Path, module: str, tensors: Mapping[str, RawTensor]) -> None:
        self.path, self.module, self.tensors = path, module, tensors

    def fail(self, part: str, problem: str) -> NoReturn:
        refuse_tensor(self.path.parent, f"{self.module}.{part}", problem)

    def matrix(self, part: str, types: Sequence[str]) -> tuple[int, int]:
        """Check that a part is a matrix of one of `types`; return its shape."""
        shape = self.shape(part, types)
        if len(shape) != 2 or 0 in shape:
            self.fail(part, f"has the shape {shape}; it must be a matrix")
        return shape[0], shape[1]

    def require(self, part: str, types: Sequence[str], shape: tuple[int, ...]) -> None:
        """Check that a part has one of `types`, and a shape."""
        if self.shape(part, types) != shape:
            self.fail(part, f"has the shape {self.tensors[part].shape}, not {shape}")

    def shape(self, part: str, types: Sequence[str]) -> tuple[int, ...]:
        """Check that a part has one of `types`; return its shape."""
        if part not in self.tensors:
            self.fail(part, "is missing")
        if self.tensors[part].type not in types:
            self.fail(part, f"has the type {self.tensors[part].type}, not {' or '.join(types)}")
        return self.tensors[part].shape

    def count_groups(self, part: str, columns: int, group_size: int | None) -> int:
        """Return the number of groups of `group_size` columns; None stands for all. Raises CheckpointError."""
        group_size = columns if group_size is None else group_size
        if columns % group_size:
            self.fail(part, f"has {columns} columns, which do not divide into groups of {group_size}")
        return columns // group_size

    def read(self, part: str) -> Tensor:
        return self.tensors[part].read()

    def read_index(self, part: str, groups: int, unset: int | None) -> Tensor | None:
        """Return the group of each column, int64. Raises CheckpointError for groups that do not exist.

        None if groups are adjacent columns, if there is no such part, or if it only consists of `unset`.
        """
        if part not in self.tensors:
            return None
        index = self.read(part).long()
        adjacent = torch.arange(len(index)) * groups // len(index)
        if torch.equal(index, adjacent) or (unset is not None and torch.equal(index, torch.full_like(index, unset))):
            return None
        if index.min() < 0 or index.max() >= groups:
            self.fail(part, f"names groups from {index.min()} to {index.max()}, but there are {groups}")
        return index

    def release(self) -> None:
        for tensor in self.tensors.values():
            tensor.release()

    def assembled(self, kind: str, shape: tuple[int, int], read: Callable[[], Tensor]) -> RawTensor:
        """Return the matrix as one tensor that the kernels hold as floats. kind: its `RawTensor.type`."""
        nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return RawTensor(shape, kind, nbytes, read, self.release, expands=True)

    def assembled_integers(
        self, kind: str, shape: tuple[int, int], groups: int, read: Callable[[], Integers], *, shuffled: bool = False
    ) -> RawTensor:
        """Return the matrix as one tensor. shuffled: whether the columns of a group are not adjacent."""
        return replace(
            self.assembled(kind, shape, lambda: read().dequantized()),
            read_grouped=lambda: read().grouped(),
            expands=shuffled or best_group(shape[1], groups) is None,
        )


def assemble(
    path: Path,
    tensors: Mapping[str, RawTensor],
    marker: str,
    parts: Collection[str],
    assembled: Callable[[Parts], RawTensor],
) -> dict[str, RawTensor]:
    """Replace the `parts` of each matrix that has a tensor `X.marker` by `X.weight`; leave the others."""
    result = dict(tensors)
    for module in [name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")]:
        found = {part: result.pop(f"{module}.{part}") for part in parts if f"{module}.{part}" in result}
        own = Parts(path, module, found)
        if f"{module}.weight" in result:
            own.fail("weight", f"is stored beside its quantized form, {module}.{marker}")
        result[f"{module}.weight"] = assembled(own)
    return result
