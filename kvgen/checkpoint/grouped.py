"""Weights as integers that share a scale, and perhaps a minimum, in groups along a row: what most of ggml's types are.

The layouts of blocks are those of ggml's ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
Codes = NDArray[Any]  # of numpy's many integer types
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Grouped:
    """A matrix of R rows and K columns: weight = code * scale + minimum.

    codes: int8, (R, K); or, of 4 bits, uint8, (R, K / 2), where a group of 2n columns takes n bytes, column i in the
        low half of byte i and column n + i in the high one.
    scales, mins: (R, K / group), fp16 or fp32; mins is None where there are none.
    group: columns that share a scale, 16 or 32.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    group: int

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K)"""
        return self.scales.shape[0], self.scales.shape[1] * self.group

    def rows(self, index: Tensor) -> Grouped:
        """The rows at `index`, int64."""
        return Grouped(
            self.codes[index], self.scales[index], None if self.mins is None else self.mins[index], self.group
        )

    def dequantized(self) -> Tensor:
        """(R, K) fp32."""
        rows, columns = self.shape
        codes = self.codes.view(rows, columns // self.group, -1)
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        weights = codes.float().mul_(self.scales.float()[..., None])
        if self.mins is not None:
            weights += self.mins.float()[..., None]
        return weights.view(rows, columns)


def quantized(weights: Tensor, bits: int) -> Grouped:
    """Round a matrix, (R, K) with K a multiple of 32, to 8 bits (ggml's Q8_0) or 4 (Q4_1): lossy.

    8 bits: a group's largest number is 127 scales. 4 bits: the codes go from its least number to its largest.
    """
    groups = weights.float().view(weights.shape[0], -1, 32)
    if bits == 8:
        scales = (groups.abs().amax(-1) / 127).half()
        codes = torch.where(scales[..., None] > 0, groups / scales[..., None].float(), 0).round().clamp(-127, 127)
        return Grouped(codes.to(torch.int8).view(weights.shape), scales, None, 32)
    mins = groups.amin(-1).half()
    scales = ((groups.amax(-1) - mins.float()) / 15).clamp(min=0).half()
    offsets = groups - mins[..., None].float()
    nibbles = torch.where(scales[..., None] > 0, offsets / scales[..., None].float(), 0).round().clamp(0, 15).byte()
    codes = nibbles[..., :16] | nibbles[..., 16:] << 4
    return Grouped(codes.view(weights.shape[0], -1), scales, mins, 32)


def read_blocks(type_name: str, blocks: Bytes, rows: int) -> Grouped | None:
    """The rows of one of ggml's quantized types; None for a type whose weights are not of this form.

    blocks: (number of blocks, bytes of one).
    """
    if type_name not in _READERS:
        return None
    group, read = _READERS[type_name]
    codes, scales, mins = (
        None if part is None else torch.from_numpy(np.ascontiguousarray(part)).view(rows, -1) for part in read(blocks)
    )
    assert codes is not None and scales is not None
    return Grouped(codes, scales, mins, group)


_Parts = tuple[NDArray[np.generic], Floats, Floats | None]


def _half(blocks: Bytes, at: int) -> Floats:
    """The fp16 at byte `at` of each block, (N, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(packed: Bytes) -> Bytes:
    """Low halves, then high halves: (..., n) to (..., 2n)."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _bits_of(packed: Bytes) -> Bytes:
    """(N, n) bytes to (N, 8n) bits, lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _q4_0(blocks: Bytes) -> _Parts:
    scale = _half(blocks, 0)
    mins = scale.astype(np.float32) * -8
    return blocks[:, 2:], scale, mins.astype(np.float16) if np.abs(mins).max() < np.finfo(np.float16).max else mins


def _q4_1(blocks: Bytes) -> _Parts:
    return blocks[:, 4:], _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 6:]) | _bits_of(blocks[:, 2:6]) << 4
    return codes.view(np.int8) - np.int8(16), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> _Parts:
    codes = _nibbles(blocks[:, 8:]) | _bits_of(blocks[:, 4:8]) << 4
    return codes.view(np.int8), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> _Parts:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _scales_of_k(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and eight minimums in 12 bytes: those of the last four are split."""
    scales, mins, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    return (
        np.concatenate((scales & 63, high & 15 | scales >> 6 << 4), axis=-1),
        np.concatenate((mins & 63, high >> 4 | mins >> 6 << 4), axis=-1),
    )


def _scaled(factor: Floats, codes: NDArray[np.generic]) -> Floats:
    return factor.astype(np.float32) * codes.astype(np.float32)


def _q4_k(blocks: Bytes) -> _Parts:
    scales, mins = _scales_of_k(blocks[:, 4:16])
    # 32 bytes hold two groups, one in the low halves, the next in the high ones; here each group has bytes of its own.
    groups = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    codes = groups[..., :16] | groups[..., 16:] << 4
    return codes, _scaled(_half(blocks, 0), scales), -_scaled(_half(blocks, 2), mins)


def _q5_k(blocks: Bytes) -> _Parts:
    scales, mins = _scales_of_k(blocks[:, 4:16])
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = _bits_of(blocks[:, 16:48]).reshape(-1, 32, 8).swapaxes(1, 2)  # bit g of byte i: group g, column i
    codes = (low | high << 4).view(np.int8)
    return codes, _scaled(_half(blocks, 0), scales), -_scaled(_half(blocks, 2), mins)


def _q6_k(blocks: Bytes) -> _Parts:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    packed = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | high << 4).view(np.int8) - np.int8(32)
    return codes, _scaled(_half(blocks, 208), blocks[:, 192:208].view(np.int8)), None


def _quarters(blocks: Bytes) -> Codes:
    """64 bytes of four 2-bit codes to codes in the order of their columns, (N, 2, 4, 32)."""
    return blocks.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3


def _paired(codes: Codes) -> Codes:
    """Codes of 4 bits in groups of 16, packed as in `Grouped`."""
    groups = codes.reshape(len(codes), 16, 16)
    packed: Codes = groups[..., :8] | groups[..., 8:] << 4
    return packed


def _q2_k(blocks: Bytes) -> _Parts:
    scales, mins = blocks[:, :16] & 15, blocks[:, :16] >> 4
    codes = _paired(_quarters(blocks[:, 16:80]))
    return codes, _scaled(_half(blocks, 80), scales), -_scaled(_half(blocks, 82), mins)


def _q3_k(blocks: Bytes) -> _Parts:
    low, high, packed = _quarters(blocks[:, 32:96]), blocks[:, :32], blocks[:, 96:108]
    bits = (high[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(-1, 2, 4, 32)
    codes = _paired(low | bits << 2)
    scale_low = _nibbles(packed[:, :8])
    scale_high = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scales = (scale_low | scale_high.reshape(-1, 16) << 4).view(np.int8) - np.int8(32)
    factors = _scaled(_half(blocks, 108), scales)
    return codes, factors, factors * np.float32(-4)


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
}
