"""Matrices in ggml's quantized types, as `Grouped` (block layouts: ggml-common.h)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from kvgen.checkpoint.grouped import E2M1_DOUBLED, Bytes, Floats, Grouped, powers_of_two

Codes = NDArray[Any]  # uint8 or int8
_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class StoredBlocks:
    """The same in blocks of a ggml type, as in a file, converted when a piece is needed.

    type: one that has groups. blocks: (stored rows, bytes per row). order: the stored row of each row, (R) or (E, R).
    """

    type: str
    blocks: Bytes
    order: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, K) or (E, R, K)"""
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return *self.order.shape, self.blocks.shape[1] // block_bytes * block

    def piece(self, first: int, last: int) -> Grouped:
        """See `Grouped.piece`."""
        return self._convert(self.order.reshape(-1)[first:last])

    def rows(self, index: Tensor) -> StoredBlocks:
        """See `Grouped.rows`."""
        return replace(self, order=self.order.reshape(-1)[index.numpy()])

    def whole(self) -> Grouped:
        return self._convert(self.order)

    def _convert(self, order: NDArray[np.int64]) -> Grouped:
        group, read = _READERS[self.type]
        flat = order.reshape(-1)
        adjacent = len(flat) == flat[-1] - flat[0] + 1 and bool((np.diff(flat) == 1).all())  # then no copy is needed
        rows = self.blocks[flat[0] : flat[-1] + 1] if adjacent else self.blocks[flat]
        _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        codes, scales, mins = (
            None if part is None else torch.from_numpy(_contiguous(part)).view(*order.shape, -1)
            for part in read(rows.reshape(-1, block_bytes))
        )
        assert codes is not None and scales is not None
        return Grouped(codes, scales, mins, group, _VALUES.get(self.type), _LOWEST.get(self.type))


def in_groups(type_name: str) -> bool:
    """Whether a ggml type has groups that `Grouped` can hold."""
    return type_name in _READERS


_Parts = tuple[NDArray[np.generic], Floats, Floats | None]


def _read_fp16(blocks: Bytes, at: int) -> Floats:
    """Return the fp16 at byte `at` of each block, (N, 1)."""
    return _contiguous(blocks[:, at : at + 2]).view(np.float16)


def _contiguous(rows: NDArray[_Number]) -> NDArray[_Number]:
    """Copy rows, (..., n), each as one item, which is several times faster than number by number."""
    if rows.strides[-1] != rows.itemsize:  # numpy may keep the order of an operand
        return np.ascontiguousarray(rows)
    item = np.dtype((np.void, rows.shape[-1] * rows.itemsize))
    return np.ascontiguousarray(rows.view(item)).view(rows.dtype)


def _unpack_nibbles(packed: Bytes) -> Bytes:
    """Return the low halves, then the high halves: (..., n) to (..., 2n)."""
    packed = _contiguous(packed)
    unpacked = np.empty((*packed.shape[:-1], 2), np.dtype((np.void, packed.shape[-1])))  # as in `_contiguous`
    unpacked[..., :1] = (packed & 15).view(unpacked.dtype)
    unpacked[..., 1:] = (packed >> 4).view(unpacked.dtype)
    return unpacked.view(np.uint8)


def _unpack_bits(packed: Bytes) -> Bytes:
    """Unpack (N, n) bytes to (N, 8n) bits, lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _with_bits(codes: Bytes, packed: Bytes) -> Bytes:
    """Add 16 to the codes, (N, 8n), whose bit in (N, n) bytes is 1; in place."""
    bits = _unpack_bits(packed)
    return np.bitwise_or(codes, np.left_shift(bits, 4, out=bits), out=codes)


def _q4_0(blocks: Bytes) -> _Parts:
    scale = _read_fp16(blocks, 0)
    mins = scale.astype(np.float32) * -8
    return blocks[:, 2:], scale, mins.astype(np.float16) if np.abs(mins).max() < np.finfo(np.float16).max else mins


def _q4_1(blocks: Bytes) -> _Parts:
    return blocks[:, 4:], _read_fp16(blocks, 0), _read_fp16(blocks, 2)


def _q5_0(blocks: Bytes) -> _Parts:
    codes = _with_bits(_unpack_nibbles(blocks[:, 6:]), blocks[:, 2:6]).view(np.int8)
    return np.subtract(codes, 16, out=codes), _read_fp16(blocks, 0), None


def _q5_1(blocks: Bytes) -> _Parts:
    codes = _with_bits(_unpack_nibbles(blocks[:, 8:]), blocks[:, 4:8])
    return codes.view(np.int8), _read_fp16(blocks, 0), _read_fp16(blocks, 2)


def _q8_0(blocks: Bytes) -> _Parts:
    return blocks[:, 2:].view(np.int8), _read_fp16(blocks, 0), None


def _unpack_k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Unpack 12 bytes to eight 6-bit scales and eight 6-bit minimums."""
    scales, mins, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    return (
        np.concatenate((scales & 63, high & 15 | scales >> 6 << 4), axis=-1),
        np.concatenate((mins & 63, high >> 4 | mins >> 6 << 4), axis=-1),
    )


def _multiply(factor: Floats, codes: NDArray[np.generic]) -> Floats:
    return factor.astype(np.float32) * codes.astype(np.float32)


def _q4_k(blocks: Bytes) -> _Parts:
    scales, mins = _unpack_k_scales(blocks[:, 4:16])
    # In ggml, 32 bytes hold two groups, in the low and the high halves; in `Grouped`, each group has its own bytes.
    groups = _unpack_nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    codes = groups[..., :16] | groups[..., 16:] << 4
    return codes, _multiply(_read_fp16(blocks, 0), scales), -_multiply(_read_fp16(blocks, 2), mins)


def _q5_k(blocks: Bytes) -> _Parts:
    scales, mins = _unpack_k_scales(blocks[:, 4:16])
    low = _unpack_nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = _unpack_bits(blocks[:, 16:48]).reshape(-1, 32, 8).swapaxes(1, 2)  # bit g of byte i: group g, column i
    codes = (low | high << 4).view(np.int8)
    return codes, _multiply(_read_fp16(blocks, 0), scales), -_multiply(_read_fp16(blocks, 2), mins)


def _q6_k(blocks: Bytes) -> _Parts:
    low = _unpack_nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    packed = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | high << 4).view(np.int8) - np.int8(32)
    return codes, _multiply(_read_fp16(blocks, 208), blocks[:, 192:208].view(np.int8)), None


def _unpack_2_bits(blocks: Bytes) -> Codes:
    """Unpack 64 bytes of four 2-bit codes to (N, 2, 4, 32), in column order."""
    return blocks.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3


def _pack_nibbles(codes: Codes) -> Codes:
    """Pack 4-bit codes in groups of 16, as in `Grouped`."""
    groups = codes.reshape(len(codes), 16, 16)
    packed: Codes = groups[..., :8] | groups[..., 8:] << 4
    return packed


def _q2_k(blocks: Bytes) -> _Parts:
    scales, mins = blocks[:, :16] & 15, blocks[:, :16] >> 4
    codes = _pack_nibbles(_unpack_2_bits(blocks[:, 16:80]))
    return codes, _multiply(_read_fp16(blocks, 80), scales), -_multiply(_read_fp16(blocks, 82), mins)


def _q3_k(blocks: Bytes) -> _Parts:
    low, high, packed = _unpack_2_bits(blocks[:, 32:96]), blocks[:, :32], blocks[:, 96:108]
    bits = (high[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(-1, 2, 4, 32)
    codes = _pack_nibbles(low | bits << 2)
    scale_low = _unpack_nibbles(packed[:, :8])
    scale_high = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scales = (scale_low | scale_high.reshape(-1, 16) << 4).view(np.int8) - np.int8(32)
    factors = _multiply(_read_fp16(blocks, 108), scales)
    return codes, factors, factors * np.float32(-4)


def _iq4_nl(blocks: Bytes) -> _Parts:
    return blocks[:, 2:], _read_fp16(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> _Parts:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=-1).reshape(-1, 8)
    return blocks[:, 8:], _multiply(_read_fp16(blocks, 0), (low | high << 4).astype(np.int8) - np.int8(32)), None


def _mxfp4(blocks: Bytes) -> _Parts:
    return blocks[:, 1:], powers_of_two(blocks[:, :1]), None


_READERS: dict[str, tuple[int, Callable[[Bytes], _Parts]]] = {
    "Q4_0": (32, _q4_0),
    "Q4_1": (32, _q4_1),
    "Q5_0": (32, _q5_0),
    "Q5_1": (32, _q5_1),
    "Q8_0": (32, _q8_0),
    "Q2_K": (16, _q2_k),
    "Q3_K": (16, _q3_k),
    "Q4_K": (32, _q4_k),
    "Q5_K": (32, _q5_k),
    "Q6_K": (16, _q6_k),
    "IQ4_NL": (32, _iq4_nl),
    "IQ4_XS": (32, _iq4_xs),
    "MXFP4": (32, _mxfp4),
}
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_VALUES = {"IQ4_NL": _IQ4, "IQ4_XS": _IQ4, "MXFP4": E2M1_DOUBLED}
_LOWEST = {"Q5_0": -16, "Q5_1": 0, "Q5_K": 0}
