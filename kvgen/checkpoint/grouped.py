"""Group-quantized matrices, and readers for ggml's quantized types (block layouts: ggml-common.h)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
Codes = NDArray[Any]  # uint8 or int8
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Grouped:
    """An (R, K) matrix, or E of them, in which groups of columns share a scale: weight = value * scale + minimum.

    codes: 8 bits: int8, (..., R, K). 4 bits: uint8, (..., R, K / 2); byte i of a group of 2n columns holds column i in
        its low half and column n + i in its high half.
    scales, mins: (..., R, K / group), fp16 or fp32; mins may be None.
    group: columns per group, 16 or 32.
    values: the value of each of the 16 codes of 4 bits; None for the codes themselves.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    group: int
    values: tuple[int, ...] | None = None

    @property
    def bits(self) -> int:
        """Bits per code, 4 or 8."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, K) or (E, R, K)"""
        return *self.scales.shape[:-1], self.scales.shape[-1] * self.group

    def rows(self, index: Tensor) -> Grouped:
        """Return the rows at `index`, int64 of the shape (R) or (E, R); those of several matrices count on."""
        codes, scales = (tensor.flatten(0, -2)[index] for tensor in (self.codes, self.scales))
        mins = None if self.mins is None else self.mins.flatten(0, -2)[index]
        return replace(self, codes=codes, scales=scales, mins=mins)

    def columns(self, index: Tensor) -> Grouped | None:
        """Return the columns at `index`, int64 (K); None if that divides groups."""
        groups = index.view(-1, self.group)
        if not torch.equal(groups - groups[:, :1], torch.arange(self.group).expand_as(groups)):
            return None
        starts = groups[:, 0] // self.group
        if not torch.equal(starts * self.group, groups[:, 0]):
            return None
        codes = self.codes.view(*self.scales.shape, -1)[..., starts, :].flatten(-2)
        mins = None if self.mins is None else self.mins[..., starts]
        return replace(self, codes=codes, scales=self.scales[..., starts], mins=mins)

    def dequantized(self) -> Tensor:
        """Return the weights in fp32."""
        codes = self.codes.view(*self.scales.shape, -1)
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        if self.values is not None:
            codes = torch.tensor(self.values, dtype=torch.int8)[codes.int()]
        weights = codes.float().mul_(self.scales.float()[..., None])
        if self.mins is not None:
            weights += self.mins.float()[..., None]
        return weights.view(self.shape)


def stacked(matrices: Sequence[Grouped]) -> Grouped | None:
    """Make E matrices of the same shape one of E. None if their codes are not of one kind."""
    first = matrices[0]
    if any((part.bits, part.group, part.values) != (first.bits, first.group, first.values) for part in matrices):
        return None
    codes, scales = torch.stack([part.codes for part in matrices]), torch.stack([part.scales for part in matrices])
    mins = None
    if any(part.mins is not None for part in matrices):
        mins = torch.stack([torch.zeros_like(part.scales) if part.mins is None else part.mins for part in matrices])
    return replace(first, codes=codes, scales=scales, mins=mins)


def quantized(weights: Tensor, bits: int) -> Grouped:
    """Quantize matrices, (..., K), K a multiple of 32, to 8 bits (as ggml's Q8_0) or 4 bits (Q4_1)."""
    groups = weights.float().view(*weights.shape[:-1], -1, 32)
    if bits == 8:
        scales = (groups.abs().amax(-1) / 127).half()
        codes = torch.where(scales[..., None] > 0, groups / scales[..., None].float(), 0).round().clamp(-127, 127)
        return Grouped(codes.to(torch.int8).flatten(-2), scales, None, 32)
    mins = groups.amin(-1).half()
    scales = ((groups.amax(-1) - mins.float()) / 15).clamp(min=0).half()
    offsets = groups - mins[..., None].float()
    nibbles = torch.where(scales[..., None] > 0, offsets / scales[..., None].float(), 0).round().clamp(0, 15).byte()
    codes = nibbles[..., :16] | nibbles[..., 16:] << 4
    return Grouped(codes.flatten(-2), scales, mins, 32)


def read_blocks(type_name: str, blocks: Bytes, *rows: int) -> Grouped | None:
    """Convert blocks of a ggml type, (blocks, bytes per block), to a matrix; None for types not in groups.

    rows: R, or E and R.
    """
    if type_name not in _READERS:
        return None
    group, read = _READERS[type_name]
    codes, scales, mins = (
        None if part is None else torch.from_numpy(np.ascontiguousarray(part)).view(*rows, -1) for part in read(blocks)
    )
    assert codes is not None and scales is not None
    return Grouped(codes, scales, mins, group, _VALUES.get(type_name))


_Parts = tuple[NDArray[np.generic], Floats, Floats | None]


def _read_fp16(blocks: Bytes, at: int) -> Floats:
    """Return the fp16 at byte `at` of each block, (N, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _unpack_nibbles(packed: Bytes) -> Bytes:
    """Return the low halves, then the high halves: (..., n) to (..., 2n)."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _unpack_bits(packed: Bytes) -> Bytes:
    """Unpack (N, n) bytes to (N, 8n) bits, lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _q4_0(blocks: Bytes) -> _Parts:
    scale = _read_fp16(blocks, 0)
    mins = scale.astype(np.float32) * -8
    return blocks[:, 2:], scale, mins.astype(np.float16) if np.abs(mins).max() < np.finfo(np.float16).max else mins


def _q4_1(blocks: Bytes) -> _Parts:
    return blocks[:, 4:], _read_fp16(blocks, 0), _read_fp16(blocks, 2)


def _q5_0(blocks: Bytes) -> _Parts:
    codes = _unpack_nibbles(blocks[:, 6:]) | _unpack_bits(blocks[:, 2:6]) << 4
    return codes.view(np.int8) - np.int8(16), _read_fp16(blocks, 0), None


def _q5_1(blocks: Bytes) -> _Parts:
    codes = _unpack_nibbles(blocks[:, 8:]) | _unpack_bits(blocks[:, 4:8]) << 4
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


def powers_of_two(exponents: Bytes) -> Floats:
    """Return half of 2^(e - 127), the scales of doubled values: fp16 if it has them exactly, else fp32."""
    scales: Floats = np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)
    exact = exponents.size == 0 or (exponents.min() >= 128 - 24 and exponents.max() <= 128 + 15)
    return scales.astype(np.float16) if exact else scales


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
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_VALUES = {"IQ4_NL": _IQ4, "IQ4_XS": _IQ4, "MXFP4": E2M1_DOUBLED}
