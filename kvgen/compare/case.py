"""What a comparison knows of the model and the text in hand, shared by probes and diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kvgen.compare.noise import Noise, float64_noise
from kvgen.contract import Backend
from kvgen.errors import KvgenError

# What a library may raise when it is called in a way that it does not foresee, as wrong patterns do.
CALL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, KvgenError)


@dataclass(frozen=True)
class Case:
    """One model on one text.

    twin: the backend in float64, if it can. ids: the text, (1, n). start: how many of them are the prompt.
    reference: uncached logits, (steps, vocab).
    """

    backend: Backend
    twin: Backend | None
    ids: Tensor
    start: int
    reference: Tensor
    noise: Noise

    @property
    def targets(self) -> Tensor:
        """What the text goes on with at each step, (steps,) int64 on the CPU."""
        return self.ids[0, self.start :].cpu()

    @cached_property
    def sharp(self) -> Case:
        """The case to experiment on: in float64 where that is possible, since there rounding hides nothing."""
        if self.twin is None:
            return self
        exact = self.noise.exact
        return Case(self.twin, None, self.ids, self.start, exact, float64_noise(self.twin, self.ids, self.start, exact))

    def alone(self, ids: Tensor) -> Tensor:
        """The best known logits after `ids`, (1, n), computed uncached: (vocab,)."""
        logits, _ = (self.twin or self.backend)(ids, None)
        return logits[0, -1].cpu()
