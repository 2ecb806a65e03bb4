"""How large rounding errors are: what separates a difference that means something from one that does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT = 6.0
"""A candidate may be this many noise floors away from uncached logits. Correct caches stay below 3 in fp32 and bf16,
and the mildest seeded fault is above 500: docs/kv-cache.md has the table."""

_ROUNDINGS = 8  # of a typical logit, measured: 5 to 24 in fp32, 2 to 12 in bf16


def eps(dtype: torch.dtype) -> float:
    """The relative size of one rounding in `dtype`."""
    return float(torch.finfo(dtype).eps)


def rms(difference: Tensor) -> Tensor:
    """Root of the mean square over the vocabulary: (..., vocab) to (...), in float64."""
    return difference.double().square().mean(-1).sqrt()


def distance(a: Tensor, b: Tensor) -> float:
    """The RMS difference of one step's logits, (vocab,) each. 0 only if they are equal bit for bit.

    Equal infinities differ by nothing. A NaN, or an infinity where the other has a number, is infinitely far away.
    """
    if torch.equal(a, b):
        return 0.0
    difference = torch.where(a == b, 0.0, a.double() - b.double())
    found = float(rms(difference))
    return math.inf if math.isnan(found) else found


def size(logits: Tensor) -> float:
    """The RMS of finite logits, (..., vocab), at the step where it is largest."""
    return float(rms(torch.where(logits.isfinite(), logits, 0.0)).max())


def typical_floor(logits: Tensor, dtype: torch.dtype) -> float:
    """The noise floor of logits, (..., vocab), computed in `dtype`, where it cannot be measured."""
    return _ROUNDINGS * eps(dtype) * size(logits)
