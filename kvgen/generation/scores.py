"""Log-probabilities of the tokens of a text. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Log-probabilities of the tokens of a text.

        >>> score = kvgen.score(loaded, "The capital of France is Paris.")
        >>> print(f"{score.count} tokens, {score.total:.2f} nats, perplexity {score.perplexity:.2f}")
        6 tokens, -15.40 nats, perplexity 13.03

    logprobs: in nats, one for each of `ids`; None for a token that is not scored, -inf for an impossible one.
    window, stride: in tokens, see `score`.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    window: int
    stride: int

    @property
    def count(self) -> int:
        """Number of scored tokens."""
        return sum(value is not None for value in self.logprobs)

    @property
    def total(self) -> float:
        """Log-likelihood of the scored tokens, in nats; summed without intermediate rounding."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp(-total / count); infinite if it overflows float64."""
        try:
            return math.exp(-self.total / self.count)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, tokens: int, size: int) -> float:
        """Bits per byte, which unlike perplexity can be compared between vocabularies: section 3.1 of arXiv:2101.00027.

        (tokens / size) * (-total / count) / ln 2. tokens: of the text without BOS and EOS, scored or not. size: of the
        text, in bytes of UTF-8. Tokens that are not scored count as surprising as the others.
        """
        return tokens / size * -self.total / self.count / math.log(2)
