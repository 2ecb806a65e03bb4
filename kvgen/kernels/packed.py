"""Matrices as the kernels read them: 32 rows interleaved, in the type that the checkpoint has."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvgen.checkpoint.grouped import Grouped
from kvgen.kernels.build import library

PANEL = 32
_INT4, _INT8 = 3, 4
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Weight(ctypes.Structure):
    """`Weight` of kernels.cpp."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("wide", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("mins", ctypes.c_void_p),
    )


class PackedMatrix:
    """A matrix of R rows and K columns.

    tensors: what it is made of, in memory that the kernels read.
    """

    def __init__(self, matrix: Tensor | Grouped) -> None:
        """matrix: (R, K); fp32, bf16 and fp16 stay as they are, as do integers in groups, and fp64 becomes fp32."""
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.tensors = _grouped(matrix) if isinstance(matrix, Grouped) else [_floats(matrix)]
        pointers = [tensor.data_ptr() for tensor in self.tensors] + [None] * (3 - len(self.tensors))
        if isinstance(matrix, Grouped):
            kind, group, wide = (_INT4 if matrix.bits == 4 else _INT8), matrix.group, self.tensors[1].itemsize == 4
        else:
            kind, group, wide = _FLOATS[self.tensors[0].dtype], 0, False
        self.weight = Weight(kind, *self.shape, group, wide, *pointers)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows at `ids`, int64 of any shape: (*ids.shape, K) fp32."""
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[1])
        count, threads = ctypes.c_int64(ids.numel()), torch.get_num_threads()
        library().kvgen_rows(
            ctypes.byref(self.weight),
            ctypes.c_void_p(ids.data_ptr()),
            count,
            ctypes.c_void_p(out.data_ptr()),
            threads,
        )
        return out

    def unpacked(self) -> Tensor:
        """All of it, (R, K) fp32."""
        return self.rows(torch.arange(self.shape[0]))


def _panels(rows: Tensor) -> Tensor:
    """(R, ...) to (P, 32, ...), with rows of zeros at the end."""
    missing = -rows.shape[0] % PANEL
    if missing:
        rows = torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:])))
    return rows.view(-1, PANEL, *rows.shape[1:])


def _interleaved(rows: Tensor) -> Tensor:
    """(R, n) to (P, n, 32)"""
    return _panels(rows).transpose(1, 2).contiguous()


def _floats(matrix: Tensor) -> Tensor:
    return _interleaved(matrix if matrix.dtype in _FLOATS else matrix.float())


def _grouped(matrix: Grouped) -> list[Tensor]:
    # Four bytes of 4-bit codes stay together, and two of 8-bit ones.
    words = matrix.codes.contiguous().view(torch.int32 if matrix.bits == 4 else torch.int16)
    numbers = [matrix.scales] if matrix.mins is None else [matrix.scales, matrix.mins]
    wide = any(tensor.dtype != torch.float16 for tensor in numbers)
    scales = [_interleaved(tensor.float() if wide else tensor) for tensor in numbers]
    return [_interleaved(words), *scales]
