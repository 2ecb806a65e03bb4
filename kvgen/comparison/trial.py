"""A wrong step to experiment on, and the findings of experiments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvgen.comparison.case import Case
from kvgen.comparison.patterns import Pattern
from kvgen.contract import Model


@dataclass(frozen=True)
class Finding:
    """An explanation. name: a short key. text: one sentence for people. evidence: the observation behind it."""

    name: str
    text: str
    evidence: str


@dataclass(frozen=True)
class Trial:
    """A pattern at its first wrong step: after `length` positions it returned `wrong`, (vocab,)."""

    case: Case
    pattern: Pattern
    call: Model
    length: int
    wrong: Tensor

    def is_like(self, logits: Tensor, ids: Tensor) -> bool:
        """Whether the pattern returned `logits`, expected after `ids`, (1, n), within rounding error."""
        return self.case.close(self.wrong, logits, ids)

    def run(self, ids: Tensor) -> Tensor:
        """Logits of the pattern after `ids`, (1, length), fed like the text: (vocab,)."""
        cache: Any = None
        for length in range(min(self.case.start, ids.shape[1]), ids.shape[1] + 1):
            logits, cache = self.call(ids[:, :length], cache)
        return logits[0, -1].cpu()

    @property
    def ids(self) -> Tensor:
        return self.case.ids[:, : self.length]

    @cached_property
    def places(self) -> bool:
        """Whether the model accepts positions and gives the right logits for the right ones."""
        right = torch.arange(self.length, device=self.ids.device)
        return self.case.close(self.with_positions(right), self.case.last_logits(self.ids), self.ids)

    def with_positions(self, positions: Tensor) -> Tensor:
        """Logits with the right cache of all but the newest token, and the newest at the given positions: (vocab,)."""
        _, cache = self.case.subject(self.ids[:, :-1], None)
        logits, _ = self.case.subject.with_positions(self.ids, cache, positions)
        return logits[0, -1].cpu()
