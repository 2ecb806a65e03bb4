"""Group-quantized matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Grouped:
    """An (R, K) matrix, or E of them, in which groups of columns share a scale: weight = value * scale + minimum.

    codes: 8 bits: int8, (..., R, K). 4 bits: uint8, (..., R, K / 2); byte i of a group of 2n columns holds column i in
        its low half and column n + i in its high half.
    scales, mins: (..., R, K / group), fp16 or fp32; mins may be None.
    group: columns per group, 16 or 32.
    values: the value of each of the 16 codes of 4 bits; None for the codes themselves.
    lowest: if all codes of 8 bits are within 32 values, the lowest of these; else None.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    group: int
    values: tuple[int, ...] | None = None
    lowest: int | None = None

    @property
    def bits(self) -> int:
        """Bits per code, 4 or 8."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, K) or (E, R, K)"""
        return *self.scales.shape[:-1], self.scales.shape[-1] * self.group

    def piece(self, first: int, last: int) -> Grouped:
        """Return rows `first` to `last`, exclusive, as one matrix; those of several matrices count on."""
        codes, scales = (tensor.flatten(0, -2)[first:last] for tensor in (self.codes, self.scales))
        mins = None if self.mins is None else self.mins.flatten(0, -2)[first:last]
        return replace(self, codes=codes, scales=scales, mins=mins)

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
    if len({(part.bits, part.group, part.values, part.lowest) for part in matrices}) > 1:
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


def powers_of_two(exponents: Bytes) -> Floats:
    """Return half of 2^(e - 127), the scales of doubled values: fp16 if it has them exactly, else fp32."""
    scales: Floats = np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)
    exact = exponents.size == 0 or (exponents.min() >= 128 - 24 and exponents.max() <= 128 + 15)
    return scales.astype(np.float16) if exact else scales


E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
