"""One token of a completion. Does not import torch, so that a client of a server starts fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "context"]
"""Why a completion ended: an end token, a stop string, max_tokens, or a full context."""


@dataclass(frozen=True)
class Step:
    """One token of a completion.

        >>> chunks = list(kvgen.stream(loaded, "Once upon a time,", kvgen.Sampling(temperature=0), max_tokens=2))
        >>> [(chunk.step.token, chunk.step.reused, chunk.step.computed) for chunk in chunks]
        [(260, 0, 5), (2240, 5, 1)]

    token: the chosen id.
    positions: length of the sequence before it. reused: how many of those came from the cache; None if unknown.
    logprob: natural log-probability of the token under the model, before any filter; None if not requested.
    top_logprobs: the most likely tokens and their log-probabilities, most likely first.
    drafted: how many draft tokens the pass computed behind that sequence.
    guessed: whether the previous token was a correct draft, so that this one needed no pass of its own.
    dropped: how many earlier tokens were not passed to the model, because of max_context.
    """

    token: int
    positions: int
    reused: int | None
    finish_reason: FinishReason | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    drafted: int = 0
    guessed: bool = False
    dropped: int = 0

    @property
    def computed(self) -> int | None:
        """Positions that the model computed for this step; None if unknown."""
        return None if self.reused is None else self.positions - self.reused + self.drafted
