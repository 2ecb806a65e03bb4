"""Matrices in the layout of the kernels: 32 rows interleaved, in the checkpoint's type."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvgen.checkpoint.gguf_blocks import StoredBlocks
from kvgen.checkpoint.grouped import Grouped
from kvgen.kernels.build import library
from kvgen.kernels.memory import WeightMemory
from kvgen.kernels.structs import Weight

PANEL = 32
_INT4, _INT8, _CODED4, _INT5 = 3, 4, 5, 6
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PIECE = 1 << 18  # numbers converted at once: what fits into a core's cache
_KEPT = 16  # pieces of a file that may be in memory
_UNITS = {2: torch.int16, 4: torch.int32}  # by size: numpy has no bfloat16


class PackedMatrix:
    """A matrix of R rows and K columns, or one for each of E experts. `tensors` own the memory of `weight`."""

    def __init__(
        self,
        matrix: Tensor | Grouped | StoredBlocks,
        release: Callable[[], None] = lambda: None,
        memory: WeightMemory | None = None,
    ) -> None:
        """matrix: (R, K) or (E, R, K). fp32, bf16, fp16 and grouped integers keep their type; fp64 becomes fp32.

        release: drop the file's pages from memory; called from time to time. memory: that of the other weights.
        """
        memory = memory or WeightMemory()
        self.shape = tuple(matrix.shape)
        values = None
        if isinstance(matrix, Tensor):
            self.tensors = [_pack_floats(matrix if matrix.dtype in _FLOATS else matrix.float(), release, memory)]
            kind, group, wide = _FLOATS[self.tensors[0].dtype], 0, False
        else:
            sample = matrix.piece(0, 1)
            self.tensors, group, values = _pack_groups(matrix, release, memory), sample.group, sample.values
            kind, wide = _INT4 if sample.bits == 4 else _INT8, self.tensors[1].itemsize == 4
            if values is not None:
                kind = _CODED4
            elif sample.lowest is not None:
                kind, values = _INT5, (sample.lowest,)
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.weight = Weight(kind, *self.shape[-2:], group, wide, *pointers)
        if values is not None:
            self.weight.values = (ctypes.c_uint8 * 16)(*(value + 128 for value in values))

    @cached_property
    def _library(self) -> ctypes.CDLL:
        """Kept, because `library` reads the source of the kernels to find the right one."""
        return library()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows at `ids`, int64 of any shape: (*ids.shape, K) fp32. Each expert has whole panels of rows."""
        ids = ids.contiguous()
        out = torch.empty(*ids.shape, self.shape[-1])
        source, target = ctypes.c_void_p(ids.data_ptr()), ctypes.c_void_p(out.data_ptr())
        count, threads = ctypes.c_int64(ids.numel()), torch.get_num_threads()
        self._library.kvgen_rows(ctypes.byref(self.weight), source, count, target, threads)
        return out

    def unpacked(self) -> Tensor:
        """Return the whole matrix or matrices, fp32."""
        *experts, rows, _ = self.shape
        padded = rows + -rows % PANEL
        return self.rows(torch.arange(math.prod(experts) * padded).view(*experts, padded)[..., :rows])


def _pieces(shape: Sequence[int], release: Callable[[], None]) -> Iterator[tuple[int, int, int]]:
    """Divide (R, K) or (E, R, K) into pieces: their first panels, first rows and last rows, exclusive, counted on."""
    *experts, rows, columns = shape
    step = max(1, _PIECE // (columns * PANEL)) * PANEL
    pieces = itertools.product(range(math.prod(experts)), range(0, rows, step))
    for number, (expert, first) in enumerate(pieces):
        start = expert * rows
        yield expert * _panels(rows) + first // PANEL, start + first, start + min(first + step, rows)
        if number % _KEPT == _KEPT - 1:
            release()


def _panels(rows: int) -> int:
    return -(-rows // PANEL)


def _new_panels(shape: Sequence[int], width: int, dtype: torch.dtype, memory: WeightMemory) -> Tensor:
    """Return memory for `width` numbers of each row of (R, K) or (E, R, K): (P, width, 32)."""
    *experts, rows, _ = shape
    panels = memory.empty((*experts, _panels(rows), width, PANEL), dtype)
    if rows % PANEL:
        panels[..., -1, :, rows % PANEL :] = 0
    return panels.flatten(0, -3)


def _write(rows: Tensor, panels: Tensor) -> None:
    """Interleave rows of n numbers, (R, ...), into panels, (P, n, 32)."""
    units = _UNITS[rows.itemsize]
    source = rows.view(units).numpy()
    inner, whole = source.shape[1:], len(source) // PANEL
    target = panels.view(units).numpy().reshape(-1, *inner, PANEL)
    target[:whole] = np.moveaxis(source[: whole * PANEL].reshape(whole, PANEL, *inner), 1, -1)
    if len(source) % PANEL:
        target[whole, ..., : len(source) % PANEL] = np.moveaxis(source[whole * PANEL :], 0, -1)


def _pack_floats(matrix: Tensor, release: Callable[[], None], memory: WeightMemory) -> Tensor:
    *experts, rows, columns = matrix.shape
    panels = _new_panels(matrix.shape, columns, matrix.dtype, memory)
    matrices = matrix.unbind() if experts else [matrix]
    for panel, first, last in _pieces(matrix.shape, release):
        expert, start = divmod(first, rows)
        _write(matrices[expert][start : start + last - first], panels[panel:])
    return panels


def _words(piece: Grouped) -> Tensor:
    """Return codes in units of four bytes, int32, (R, n) or with n divided.

    Those of 8 bits become unsigned, and units of a group's halves take turns, as the halves of bytes do with 4 bits.
    """
    codes = piece.codes.contiguous()
    if piece.lowest is not None:
        return _words_of_5_bits(codes.numpy() - np.int8(piece.lowest))
    if piece.bits == 8:  # numpy, because torch would start threads of its own in each thread that reads weights
        units = torch.from_numpy(codes.numpy() ^ np.int8(-128)).view(torch.int32)
        return units.view(*piece.scales.shape, 2, piece.group // 8).transpose(-1, -2)
    return codes.view(torch.int32)


def _words_of_5_bits(codes: NDArray[np.int8]) -> Tensor:
    """Return five words of each group of 32 codes, (R, K) to (R, G, 5): the lower 4 bits as above, then the highest."""
    columns = codes.view(np.uint32).reshape(-1, 8).T  # four columns each: those of side 0, then of side 1
    words = np.zeros((5, columns.shape[1]), np.uint32)
    for i, four in enumerate(columns):
        words[i % 4] |= (four & 0x0F0F0F0F) << i // 4 * 4
        words[4] |= (four >> 4 & 0x01010101) << i
    return torch.from_numpy(words.view(np.int32).reshape(5, len(codes), -1).transpose(1, 2, 0))


def _pack_groups(matrix: Grouped | StoredBlocks, release: Callable[[], None], memory: WeightMemory) -> list[Tensor]:
    """Interleave units of four bytes of codes, and then scales and minimums."""
    tensors: list[Tensor] = []
    for panel, first, last in _pieces(matrix.shape, release):
        piece = matrix.piece(first, last)
        parts = [_words(piece), piece.scales, *([] if piece.mins is None else [piece.mins])]
        if not tensors:
            tensors = [_new_panels(matrix.shape, part[0].numel(), part.dtype, memory) for part in parts]
        if any(part.dtype != torch.float16 for part in (*parts[1:], *tensors[1:])):  # all fp32, if any is
            tensors[1:], parts[1:] = ([part.float() for part in some[1:]] for some in (tensors, parts))
        for part, panels in zip(parts, tensors, strict=True):
            _write(part, panels[panel:])
    return tensors
