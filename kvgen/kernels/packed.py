"""Matrices in the layout of the kernels: 32 rows interleaved, in the checkpoint's type."""

from __future__ import annotations

import ctypes
import math

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from kvgen.checkpoint.grouped import Grouped
from kvgen.kernels.build import library
from kvgen.kernels.structs import Weight

PANEL = 32
_INT4, _INT8, _CODED4 = 3, 4, 5
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class PackedMatrix:
    """A matrix of R rows and K columns, or one for each of E experts. `tensors` own the memory of `weight`."""

    def __init__(self, matrix: Tensor | Grouped) -> None:
        """matrix: (R, K) or (E, R, K). fp32, bf16, fp16 and grouped integers keep their type; fp64 becomes fp32."""
        self.shape = tuple(matrix.shape)
        if isinstance(matrix, Grouped):
            self.tensors = _pack_groups(matrix)
            kind, group, wide = (_INT4 if matrix.bits == 4 else _INT8), matrix.group, self.tensors[1].itemsize == 4
            kind = _CODED4 if matrix.values is not None else kind
        else:
            self.tensors = [_interleave(matrix if matrix.dtype in _FLOATS else matrix.float())]
            kind, group, wide = _FLOATS[self.tensors[0].dtype], 0, False
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.weight = Weight(kind, *self.shape[-2:], group, wide, *pointers)
        if isinstance(matrix, Grouped) and matrix.values is not None:
            self.weight.values = (ctypes.c_uint8 * 16)(*(value + 128 for value in matrix.values))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows at `ids`, int64 of any shape: (*ids.shape, K) fp32. Each expert has whole panels of rows."""
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[-1])
        source, target = ctypes.c_void_p(ids.data_ptr()), ctypes.c_void_p(out.data_ptr())
        count, threads = ctypes.c_int64(ids.numel()), torch.get_num_threads()
        library().kvgen_rows(ctypes.byref(self.weight), source, count, target, threads)
        return out

    def unpacked(self) -> Tensor:
        """Return the whole matrix or matrices, fp32."""
        *experts, rows, _ = self.shape
        padded = rows + -rows % PANEL
        return self.rows(torch.arange(math.prod(experts) * padded).view(*experts, padded)[..., :rows])


def _interleave(rows: Tensor) -> Tensor:
    """(..., R, n) to (..., P, n, 32), padded with rows of zeros."""
    missing = -rows.shape[-2] % PANEL
    if missing:
        rows = F.pad(rows, (0, 0, 0, missing))
    return rows.view(*rows.shape[:-2], -1, PANEL, rows.shape[-1]).transpose(-1, -2).contiguous()


def _pack_groups(matrix: Grouped) -> list[Tensor]:
    codes = matrix.codes.contiguous()
    if matrix.bits == 8:  # unsigned, and a group's second half between words of its first, as in bytes of two codes
        shape = *matrix.scales.shape, 2, matrix.group // 8, 4
        codes = (codes ^ -128).view(shape).transpose(-3, -2).reshape(matrix.codes.shape)
    words = codes.view(torch.int32)
    numbers = [matrix.scales] if matrix.mins is None else [matrix.scales, matrix.mins]
    wide = any(tensor.dtype != torch.float16 for tensor in numbers)
    return [_interleave(words), *(_interleave(tensor.float() if wide else tensor) for tensor in numbers)]
