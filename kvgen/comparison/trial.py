"""A wrong step to experiment on, and the findings of experiments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kvgen.comparison.case import Case
from kvgen.comparison.patterns import Pattern
from kvgen.comparison.subjects import Subject
from kvgen.contract import Model
from kvgen.errors import UnsupportedError


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

    def run(self, ids: Tensor, start: int | None = None) -> Tensor:
        """Logits of the pattern after `ids`, (1, length), fed like the text, or `start` tokens at once: (vocab,)."""
        cache: Any = None
        for length in range(min(start or self.case.start, ids.shape[1]), ids.shape[1] + 1):
            logits, cache = self.call(ids[:, :length], cache)
        return logits[0, -1].cpu()

    @property
    def ids(self) -> Tensor:
        return self.case.ids[:, : self.length]

    @cached_property
    def places(self) -> bool:
        """Whether the model accepts positions and gives the right logits for the right ones."""
        right = torch.arange(self.length, device=self.ids.device)
        try:
            logits = self.with_positions(right)
        except UnsupportedError:
            return False
        return self.case.close(logits, self.case.last_logits(self.ids), self.ids)

    def with_positions(self, positions: Tensor) -> Tensor:
        """Logits with the right cache of all but the newest token, and the newest at the given positions: (vocab,)."""
        _, cache = self.case.subject(self.ids[:, :-1], None)
        logits, _ = self.case.subject.with_positions(self.ids, cache, positions)
        return logits[0, -1].cpu()


def nondeterministic(subject: Subject, difference: float) -> Finding:
    training = [] if subject.module is None else _in_training_mode(subject.module)
    why = (
        "dropout or stochastic depth is on. Put it in evaluation mode: model.eval()."
        if training
        else "a race, uninitialized memory, or random numbers."
    )
    names = f"; in training mode: {', '.join(training[:5])}" if training else ""
    return Finding(
        "not deterministic",
        f"The model is not deterministic: {why}",
        f"two identical runs differ by {difference:.2g}{names}",
    )


def _in_training_mode(module: nn.Module) -> list[str]:
    """Names of the modules in training mode, or of the dropout modules among them."""
    training = [(name, part) for name, part in module.named_modules() if part.training]
    random = [f"{name} ({type(part).__name__})" for name, part in training if "Drop" in type(part).__name__]
    return random or [name or type(part).__name__ for name, part in training]
