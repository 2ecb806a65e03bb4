"""The size of rounding errors, which separates a real difference from noise."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)

LIMIT = 6.0
"""Largest accepted distance from uncached logits, in noise floors. Correct caches stay below 3 in fp32 and bf16; the
mildest seeded fault is above 500 (table in docs/kv-cache.md)."""

BEYOND_DOUBT = 100.0
"""Noise floors that no rounding reaches, unless the model enlarges it (`Reference.shaken_floor`). Between `LIMIT` and
this, a wider dtype decides: where a computation chooses, as a router chooses experts between nearly equal scores, one
rounding can change a logit by more."""

_MASK = 1e4  # below the largest logit; exp(-104) is 0 in float32
_SPREAD = 4.0  # times the largest logit: where that is huge, others that far below it are ordinary
_ROUNDINGS = 8  # rounding errors of a typical logit; measured: 5 to 24 in fp32, 2 to 12 in bf16


def eps(dtype: torch.dtype) -> float:
    """The relative size of one rounding in `dtype`."""
    return float(torch.finfo(dtype).eps)


def is_rounding(ratio: float, wider_ratio: float, dtype: torch.dtype, wider: torch.dtype) -> bool:
    """Whether a distance from uncached logits is rounding, given it in noise floors of a dtype and of a wider one.

    Rounding shrinks as its dtype gets wider, whatever the model makes of it. A fault stays, so that it grows in noise
    floors: in float64 instead of float32 by 5e8 times.
    """
    finer = eps(dtype) / eps(wider)
    return wider_ratio <= LIMIT or (finer > 1 and wider_ratio <= ratio * math.sqrt(finer))


def rms(difference: Tensor) -> Tensor:
    """Root of the mean square over the vocabulary: (..., vocab) to (...), in float64."""
    return difference.double().square().mean(-1).sqrt()


def distance(a: Tensor, b: Tensor) -> float:
    """RMS difference of two logit vectors, (vocab,) each; 0 only if they are equal bit for bit.

    Equal infinities differ by 0; so do logits that are masked on both sides. NaN, or an infinity on one side only,
    gives infinity.
    """
    if torch.equal(a, b):
        return 0.0
    difference = torch.where((a == b) | (_masked(a) & _masked(b)), 0.0, a.double() - b.double())
    found = float(rms(difference))
    return math.inf if math.isnan(found) else max(found, sys.float_info.min)


def size(logits: Tensor) -> float:
    """Largest RMS of finite logits that are not masked over the steps of (..., vocab)."""
    return float(rms(torch.where(logits.isfinite() & ~_masked(logits), logits, 0.0)).max())


def _masked(logits: Tensor) -> Tensor:
    """Logits so far below the largest, (..., vocab), that they are a mask: its rounding would hide any fault."""
    largest = torch.where(logits.isfinite(), logits, -math.inf).max(-1, keepdim=True).values
    return logits <= largest - (_SPREAD * largest.abs()).clamp(min=_MASK)


def typical_floor(logits: Tensor, dtype: torch.dtype) -> float:
    """A typical noise floor of logits, (..., vocab), computed in `dtype`: a lower bound of the measured one.

    Logits of a narrower dtype are at least one rounding of their own apart.
    """
    return max(_ROUNDINGS * eps(dtype), eps(logits.dtype)) * size(logits)
