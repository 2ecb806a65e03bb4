"""How far apart two answers to the same prompt are, from the log-probabilities that both name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile

from kvgen.comparison.servers.server import Answer, Step

_FINE = 2.0**-10  # finest spacing of logits to look for; finer ones show in any numbers
_COARSE = 1.0
_ON_GRID = 8e-5
_ROUNDING = 4e-6  # of log-probabilities of some tens in float32, as servers print them
_FLAT = 50.0  # nats below the most likely token; further down it does not matter how far
_FEW = 4  # tokens that show a spacing


def step_distance(a: Step, b: Step) -> float:
    """Root of the mean square difference over the tokens that either names, in nats.

    A token that one side does not name has at most the smallest log-probability that it names.
    """
    if not a or not b or any(map(math.isnan, (*a.values(), *b.values()))):
        return math.inf
    least_a, least_b = min(a.values()), min(b.values())
    differences = [_cut(a[token], a) - _cut(b[token], b) for token in a.keys() & b.keys()]
    differences += [max(0.0, _cut(a[token], a) - _cut(least_b, b)) for token in a.keys() - b.keys()]
    differences += [max(0.0, _cut(b[token], b) - _cut(least_a, a)) for token in b.keys() - a.keys()]
    return math.sqrt(sum(difference**2 for difference in differences) / len(differences))


def _cut(value: float, step: Step) -> float:
    return max(value, max(step.values()) - _FLAT)


def distances(a: Answer, b: Answer) -> list[float]:
    """Distance of each step that follows the same text: up to the first token that differs, and of that step itself."""
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a.tokens, b.tokens, strict=False))))
    pairs = zip(a.steps[: same + 1], b.steps[: same + 1], strict=False)
    return [step_distance(*pair) for pair in pairs] or [math.inf if a.steps or b.steps else 0.0]


def distance(a: Answer, b: Answer) -> float:
    """Distance of the worst step."""
    return max(distances(a, b))


def printed_precision(steps: Sequence[Step]) -> float:
    """The smallest difference that log-probabilities can have: of their decimals, or the spacing of 16-bit logits."""
    values = [value for step in steps for value in step.values() if math.isfinite(value)]
    largest = max((abs(value) for value in values), default=1.0)
    decimals = max((_decimals(value) for value in values), default=0)
    spacing = max((_spacing(step) for step in steps), default=0.0)
    return max(_ROUNDING * largest, 10.0**-decimals if decimals <= 5 else 0.0, spacing)


def _decimals(value: float) -> int:
    text = f"{value:.9f}".rstrip("0")
    return len(text) - text.index(".") - 1


def _spacing(step: Step) -> float:
    """The largest power of two that all differences of a step are multiples of; 0 if there is none."""
    values = [value for value in step.values() if math.isfinite(value)]
    offsets = [value - values[0] for value in values[1:]]
    if len(offsets) < _FEW:
        return 0.0
    spacing = _COARSE
    while spacing >= _FINE:
        if all(abs(offset - spacing * round(offset / spacing)) < _ON_GRID for offset in offsets):
            return spacing
        spacing /= 2
    return 0.0
