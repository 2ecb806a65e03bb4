"""The size of rounding errors, which separates a real difference from noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT = 6.0
"""Largest accepted distance from uncached logits, in noise floors. Correct caches stay below 3 in fp32 and bf16; the
mildest seeded fault is above 500 (table in docs/kv-cache.md)."""

_ROUNDINGS = 8  # rounding errors of a typical logit; measured: 5 to 24 in fp32, 2 to 12 in bf16


def eps(dtype: torch.dtype) -> float:
    """The relative size of one rounding in `dtype`."""
    return float(torch.finfo(dtype).eps)


def rms(difference: Tensor) -> Tensor:
    """Root of the mean square over the vocabulary: (..., vocab) to (...), in float64."""
    return difference.double().square().mean(-1).sqrt()


def distance(a: Tensor, b: Tensor) -> float:
    """RMS difference of two logit vectors, (vocab,) each; 0 only if they are equal bit for bit.

    Equal infinities differ by 0. NaN, or an infinity on one side only, gives infinity.
    """
    if torch.equal(a, b):
        return 0.0
    difference = torch.where(a == b, 0.0, a.double() - b.double())
    found = float(rms(difference))
    return math.inf if math.isnan(found) else found


def size(logits: Tensor) -> float:
    """Largest RMS of finite logits over the steps of (..., vocab)."""
    return float(rms(torch.where(logits.isfinite(), logits, 0.0)).max())


def typical_floor(logits: Tensor, dtype: torch.dtype) -> float:
    """A typical noise floor of logits, (..., vocab), computed in `dtype`: a lower bound of the measured one."""
    return _ROUNDINGS * eps(dtype) * size(logits)
