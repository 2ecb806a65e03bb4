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

_REPEATS = 2
_SHARED = 4  # a part of this of an unseen text may be in the cache: a beginning that the server adds


class ReusedError(KvgenError):
    """The server read its cache for a request that should not."""


@dataclass(frozen=True)
class Control:
    """An uncached answer, and how far the server differs from itself on this text.

    repeated: largest distance to the same request, sent again. decoded: largest distance between a step of decoding and
    an uncached request for the text up to there; None if it could not be measured. printed: precision of the numbers.
    measured: whether the server could be asked for this text more than once without its cache.
    """

    answer: Answer
    measured: bool
    repeated: float
    decoded: float | None
    printed: float

    @property
    def noise(self) -> float:
        """The noise floor of the text, in nats. What is too large to be noise does not count."""
        found = max(self.printed, self.repeated)
        return max(found, self.decoded) if self.decoded is not None and self.decoded <= LARGEST_NOISE else found

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
        """The uncached answer to a prompt with its control; asked for once."""
        if prompt not in self._kept:
            answer = self.answer(prompt)
            again = [self._uncached(prompt, self.steps) for _ in range(_REPEATS if self.server.repeats else 0)]
            ends = {1, len(answer.tokens) - 1} if self.server.repeats else set()
            self._kept[prompt] = Control(
                answer,
                self.server.repeats,
                max((distance(answer, other) for other in again), default=0.0),
                self._decoded(prompt, answer, sorted(ends)),
                printed_precision(answer.steps),
            )
        return self._kept[prompt]

    def widened(self, prompt: Prompt) -> Control:
        """The control of a prompt once more, with every step of decoding: before a difference counts as a fault."""
        known = self.of(prompt)
        if not self.server.repeats:
            return known
        decoded = self._decoded(prompt, known.answer, range(1, len(known.answer.tokens)))
        self._kept[prompt] = replace(known, decoded=decoded)
        return self._kept[prompt]

    def _decoded(self, prompt: Prompt, answer: Answer, steps: list[int] | range) -> float | None:
        """Largest distance between steps of decoding and uncached requests of the same texts."""
        found = []
        for step in steps:
            if not 0 < step < len(answer.steps):
                continue
            other = self._uncached(prompt + answer.tokens[:step], 1)
            if answer.length is None or other.length is None or other.length == answer.length + step:
                found.append(step_distance(answer.steps[step], other.steps[0]) if other.steps else math.inf)
        return max(found, default=None)

    def _uncached(self, prompt: Prompt, steps: int) -> Answer:
        answer = self.server.ask(prompt, steps, None)
        allowed = 0 if self.server.repeats else (answer.length or len(prompt)) // _SHARED
        if answer.reused and answer.reused > allowed:
            raise ReusedError(f"the server took {answer.reused} positions from its cache for a request that forbids it")
        return answer
