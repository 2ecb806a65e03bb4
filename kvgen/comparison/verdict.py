"""What the numbers mean."""

from __future__ import annotations

from enum import Enum


class Verdict(str, Enum):
    """The verdict on a pattern's logits, and on the tokens that it chooses by itself.

    EQUIVALENT: no further from the exact logits than rounding. NEAR_TIE, of tokens alone: they part, but only
    where the two most likely are closer than the noise. DIFFERENT: structurally. LOSSY: different, and declared
    so. UNSUPPORTED: the model says that it cannot be called so. NOT_COMPARABLE: the reference is no reference,
    since the model is not deterministic or not causal.
    """

    EQUIVALENT = "equivalent"
    NEAR_TIE = "near-tie"
    DIFFERENT = "different"
    LOSSY = "lossy"
    UNSUPPORTED = "unsupported"
    NOT_COMPARABLE = "not comparable"

    def __str__(self) -> str:
        return self.value


ACCEPTABLE = {Verdict.EQUIVALENT, Verdict.NEAR_TIE, Verdict.LOSSY}
"""The verdicts on the right pattern with which `kvgen compare` exits 0."""
