"""Uncached logits of any text, and the size of rounding errors on that text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvgen.comparison.rounding import LIMIT, NARROW, distance, size, typical_floor
from kvgen.comparison.subjects import Subject
from kvgen.errors import ModelError

_FAR = 100.0  # limits; beyond, no floor needs measuring: measured floors stay within 5 typical ones
_SHAKEN, _TRIALS = 1e5, 8  # floors up to which random roundings may explain a distance, and how many are tried
_FAR_APART = 2**-5  # of the size of the logits
_LONGER = (2, 16)  # extra tokens in a pass: other matrix sizes, other roundings
_MAX_KEPT = 64  # logits of single texts: with a large vocabulary a megabyte each


@dataclass(frozen=True)
class Judgement:
    """Distance of logits from uncached logits of the same text.

    exact: whether they are equal bit for bit. floor: noise floor of the text; 0 if exact, since it is not measured.
    distances: RMS difference of each step. length: positions of the worst step.
    """

    exact: bool
    floor: float
    distances: tuple[float, ...]
    length: int

    @property
    def ratio(self) -> float:
        """Distance of the worst step, in noise floors."""
        return 0.0 if self.exact else max(self.distances) / max(self.floor, sys.float_info.min)

    @property
    def wrong(self) -> bool:
        return self.ratio > LIMIT

    @property
    def first_wrong(self) -> int | None:
        """Index of the first wrong step; None if there is none."""
        return next((step for step, apart in enumerate(self.distances) if apart > LIMIT * self.floor), None)


class Reference:
    """A model without its cache. A noise floor is measured on the text that it judges, never on a different one.

    The floor is the largest difference, over a few steps of the text, between two uncached computations of the same
    logits: a pass that ends at the step, and a longer pass; if these are too close, another implementation too, if the
    model has one. It is at least the size of a typical rounding error, and at least `least_floor`, which whoever finds
    that the model rounds to fewer bits than its logits have may set.

    each_length: whether logits of each length need a pass of their own, since longer passes compute them otherwise.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.least_floor, self.each_length = subject, 0.0, False
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._floors: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def typical_floor(self, logits: Tensor) -> float:
        """A lower bound of the noise floor of logits, (..., vocab)."""
        return max(self.least_floor, typical_floor(logits, self.subject.dtype))

    def last_logits(self, ids: Tensor) -> Tensor:
        """Logits after `ids`, (1, n), from one uncached pass: (vocab,)."""
        key = tuple(ids[0].tolist())
        if key not in self._kept:
            if len(self._kept) == _MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self.subject.uncached(ids)[0, -1].cpu()
        return self._kept[key]

    def step_logits(self, ids: Tensor, lengths: Sequence[int], more: int = 1) -> Tensor:
        """Uncached logits after the first `lengths` positions of `ids`, (1, n): (len(lengths), vocab).

        One pass computes all of them if the model returns logits of all positions. The pass is `more` positions longer
        than needed, within the context, so that it rounds differently from `last_logits`.

        Raises ModelError if they are NaN.
        """
        wanted = [length - 1 for length in lengths]
        end = max(lengths) + more
        passed = torch.cat((ids, ids[:, :1].expand(1, more)), dim=1)[:, :end]
        longest = self.subject.context_length
        if longest is not None and end > longest:
            passed = passed[:, :longest]
        found = None if self.each_length else self.subject.logits_at(passed, wanted)
        if found is None:
            found = torch.stack([self.last_logits(ids[:, :length]) for length in lengths])
        found = found.cpu()
        if found.isnan().any():
            raise ModelError("the model's uncached logits are NaN: there is nothing to compare with")
        return found

    def text_logits(self, ids: Tensor, start: int) -> Tensor:
        """Uncached logits after `start` to n - 1 positions of `ids`, (1, n): (n - start, vocab). See `step_logits`."""
        lengths = range(start, ids.shape[1])
        found = self.step_logits(ids, lengths)
        return self.step_logits(ids, lengths) if self._needs_each_length(ids, start, found[0]) else found

    def _needs_each_length(self, ids: Tensor, length: int, longer: Tensor) -> bool:
        """Set `each_length` if these logits, (vocab,), of a pass over `ids` need it; return whether it was set now."""
        if self.each_length or not self._far(self.last_logits(ids[:, :length]), longer):
            return False
        sharper = self if self.subject.dtype == torch.float64 else self.wider  # where rounding has shrunk
        self.each_length = sharper is not None and sharper._depends_on_length(ids, length)
        return self.each_length

    def _depends_on_length(self, ids: Tensor, length: int) -> bool:
        """Whether the logits after `length` positions depend on how long a pass over `ids`, (1, n), is, as with dynamic
        RoPE scaling, and not on which tokens come later, as in a model that is not causal."""
        other = ids.clone()
        other[:, length:] = ids[:, :1]
        one, two = (self.subject.logits_at(passed, [length - 1]) for passed in (ids, other))
        if one is None or two is None:
            return False
        return self._far(self.last_logits(ids[:, :length]), one[0]) and not self._far(one[0], two[0])

    @staticmethod
    def _far(logits: Tensor, longer: Tensor) -> bool:
        return distance(logits.cpu(), longer.cpu()) > _FAR_APART * size(longer)

    @cached_property
    def wider(self) -> Reference | None:
        """The model in the next wider dtype; None if it does not support that."""
        twin = self.subject.in_dtype(torch.float32 if self.subject.dtype in NARROW else torch.float64)
        return None if twin is None else Reference(twin)

    def noise_floor(self, ids: Tensor, longer: tuple[int, ...] = (1,)) -> float:
        """Noise floor of the logits after `ids`, (1, n), from passes that are longer by these numbers of positions.

        Passes of nearly equal length may round alike by chance. So the default alone never makes a verdict
        "different"; `_LONGER` is measured first.
        """
        key = tuple(ids[0].tolist()), longer
        if key not in self._floors:
            expected, length = self.last_logits(ids), ids.shape[1]
            others = [self.step_logits(ids, [length], more)[0] for more in longer]
            if (otherwise := self.subject.rounded_otherwise(ids)) is not None:
                others.append(otherwise.cpu())
            measured = (distance(expected, other) for other in others)
            self._floors[key] = max(self.typical_floor(expected), *measured)
        return self._floors[key]

    def shaken_floor(self, ids: Tensor) -> float:
        """Largest distance of the logits after `ids`, (1, n), from such with random roundings; 0 if that is unknown.

        Where the model rounds to a few bits, as with activations in integers, one rounding decides between two levels.
        """
        key = tuple(ids[0].tolist()), ()
        if key not in self._floors:
            expected = self.last_logits(ids)
            others = (self.subject.shaken(ids, seed) for seed in range(_TRIALS))
            self._floors[key] = max((distance(expected, one.cpu()) for one in others if one is not None), default=0.0)
        return self._floors[key]

    def close(self, a: Tensor, b: Tensor, ids: Tensor) -> bool:
        """Whether two results for the logits after `ids`, (vocab,) each, are equal within rounding error."""
        apart = distance(a.cpu(), b.cpu())
        typical = LIMIT * self.typical_floor(b)
        if apart <= typical or apart > _FAR * typical or not math.isfinite(apart):
            return apart <= typical
        return apart <= LIMIT * self.noise_floor(ids) or apart <= LIMIT * self.noise_floor(ids, _LONGER)

    def judge(self, actual: Tensor, expected: Tensor, ids: Tensor, lengths: Sequence[int]) -> Judgement:
        """Compare logits, (steps, vocab), with uncached ones of the same text.

        expected: `step_logits(ids, lengths)`. Logits equal to either uncached computation bit for bit are right.
        """
        distances = [distance(*pair) for pair in zip(actual, expected, strict=True)]
        if not any(distances):
            return Judgement(True, 0.0, tuple(distances), lengths[-1])
        worst = max(range(len(lengths)), key=distances.__getitem__)
        floor = self.typical_floor(expected)
        if math.isfinite(distances[worst]):
            for step in {worst, 0, len(lengths) // 2, len(lengths) - 1}:
                other = self.last_logits(ids[:, : lengths[step]])
                if self._needs_each_length(ids, lengths[step], expected[step]):
                    return self.judge(actual, self.step_logits(ids, lengths), ids, lengths)
                distances[step] = min(distances[step], distance(actual[step], other))
                floor = max(floor, distance(other, expected[step]))
            worst = max(range(len(lengths)), key=distances.__getitem__)
            if LIMIT * floor < distances[worst] <= _FAR * LIMIT * floor:
                floor = max(floor, self.noise_floor(ids[:, : lengths[worst]], _LONGER))
            if LIMIT * floor < distances[worst] <= _SHAKEN * floor:
                floor = max(floor, self.shaken_floor(ids[:, : lengths[worst]]))
        return Judgement(not any(distances), floor, tuple(distances), lengths[worst])

    def judge_step(self, actual: Tensor, ids: Tensor) -> Judgement:
        """Compare the logits of one step, (vocab,), with uncached ones after `ids`, (1, n)."""
        expected = self.last_logits(ids)
        if torch.equal(actual, expected):
            return Judgement(True, 0.0, (0.0,), ids.shape[1])
        length = ids.shape[1]
        return self.judge(actual[None], self.step_logits(ids, [length]), ids, [length])
