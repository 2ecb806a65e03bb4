"""Uncached answers of a server, each with a control: how far the server differs from itself on the same text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kvgen.comparison.servers.distance import distance, printed_precision, step_distance
from kvgen.comparison.servers.server import Answer, Prompt, Server
from kvgen.errors import KvgenError

LIMIT = 4.0
"""Largest accepted distance from the uncached answer, in noise floors of the same text. Cache hits of real servers stay
below 3 (docs/compare-servers.md)."""

LARGEST_NOISE = 0.5
"""Nats. A server that differs from itself by more, with and without steps of decoding, has a fault: rounding of 16-bit
logits and of 8-bit activations stays below."""

_CONTROLS = 4  # measurements of a whole control
_SHARED = 4  # a part of this of an unseen text may be in the cache: a beginning that the server adds


class ReusedError(KvgenError):
    """The server read its cache for a request that should not."""


@dataclass(frozen=True)
class Control:
    """An uncached answer, and how far the server differs from itself on this text. Distances are in nats.

    repeats: distances to the same request, sent again. decoding: distances between steps of decoding and uncached
    requests for the text up to there. printed: precision of the numbers. measurements: how many were made.
    measured: whether the server could be asked for this text more than once without its cache.
    """

    answer: Answer
    measured: bool
    printed: float
    repeats: tuple[float, ...] = ()
    decoding: tuple[float, ...] = ()
    measurements: int = 0

    @property
    def repeated(self) -> float:
        """Largest distance to the same request."""
        return max(self.repeats, default=0.0)

    @property
    def decoded(self) -> float | None:
        """Largest distance of a step of decoding; None if none could be measured."""
        return max(self.decoding, default=None)

    @property
    def noise(self) -> float:
        """The noise floor of the text, in nats. What is too large to be noise does not count."""
        return max(self.printed, self.repeated, *(found for found in self.decoding if found <= LARGEST_NOISE))

    @property
    def limit(self) -> float:
        """Largest distance from the uncached answer that rounding explains, in nats."""
        return LIMIT * self.noise if self.measured else max(LARGEST_NOISE, LIMIT * self.noise)


class Reference:
    """Uncached answers, kept by prompt. steps: number of tokens to generate for each."""

    def __init__(self, server: Server, steps: int) -> None:
        self.server, self.steps = server, steps
        self._kept: dict[Prompt, Control] = {}
        self._answers: dict[Prompt, Answer] = {}

    def answer(self, prompt: Prompt) -> Answer:
        """The uncached answer to a prompt, without its control."""
        if prompt not in self._answers:
            self._answers[prompt] = self._uncached(prompt, self.steps)
        return self._answers[prompt]

    def knows(self, prompt: Prompt) -> bool:
        """Whether the prompt was asked for."""
        return prompt in self._answers

    def of(self, prompt: Prompt) -> Control:
        """The uncached answer to a prompt with its control: the request twice more, and two steps of decoding."""
        return self._measure(prompt, math.inf, _CONTROLS)

    def explaining(self, prompt: Prompt, apart: float) -> Control:
        """The control of a prompt, measured until rounding explains a distance; a fault has all steps of decoding.

        What is left out could only raise the limit, and so leaves the verdict as it is.
        """
        return self._measure(prompt, apart, None)

    def _measure(self, prompt: Prompt, apart: float, most: int | None) -> Control:
        answer = self.answer(prompt)
        control = self._kept.get(prompt) or Control(answer, self.server.repeats, printed_precision(answer.steps))
        plan = _plan(len(answer.steps)) if self.server.repeats else []
        for step in plan[control.measurements : most]:
            if apart <= control.limit:
                break
            control = replace(self._control(prompt, control, step), measurements=control.measurements + 1)
            self._kept[prompt] = control
        return control

    def _control(self, prompt: Prompt, control: Control, step: int) -> Control:
        """The control with one more measurement: of a step of decoding, or of the same request for step 0."""
        if step == 0:
            again = distance(control.answer, self._uncached(prompt, self.steps))
            return replace(control, repeats=(*control.repeats, again))
        known, other = control.answer, self._uncached(prompt + control.answer.tokens[:step], 1)
        if known.length is not None and other.length is not None and other.length != known.length + step:
            return control  # the server read another text than it had generated
        apart = step_distance(known.steps[step], other.steps[0]) if other.steps else math.inf
        return replace(control, decoding=(*control.decoding, apart))

    def _uncached(self, prompt: Prompt, steps: int) -> Answer:
        answer = self.server.ask(prompt, steps, None)
        allowed = 0 if self.server.repeats else (answer.length or len(prompt)) // _SHARED
        if answer.reused and answer.reused > allowed:
            raise ReusedError(f"the server took {answer.reused} positions from its cache for a request that forbids it")
        return answer


def _plan(steps: int) -> list[int]:
    """Measurements for an answer, those that show most first: steps of decoding, and 0 for the same request."""
    first, last = [1][: steps - 1], [steps - 1][: max(0, steps - 2)]
    return [*first, 0, *last, 0, *range(2, steps - 1)]
