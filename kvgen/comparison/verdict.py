"""The verdicts that a comparison can reach."""

from __future__ import annotations

from enum import Enum


class Verdict(str, Enum):
    """Verdict on a pattern's logits, or on the tokens that it generates.

    EQUIVALENT: equal to uncached decoding within rounding error.
    NEAR_TIE (tokens only): different tokens, but only where the top two logits are closer than rounding error.
    DIFFERENT: further apart than rounding explains.
    LOSSY: different, and the model declares that its cache is lossy.
    UNSUPPORTED: the model cannot be called this way.
    NOT_COMPARABLE: the model is not deterministic or not causal, so uncached logits are no reference.
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
"""Verdicts on a right pattern for which `kvgen compare` exits with 0."""
