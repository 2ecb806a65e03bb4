"""Uncached logits of any text, and how far rounding alone moves them on that very text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgen.comparison.rounding import LIMIT, distance, typical_floor
from kvgen.comparison.subjects import Subject
from kvgen.errors import ModelError

_FAR = 100.0  # a difference of so many limits needs no measured floor, which stays within 5 typical ones
_LONGER = (2, 16)  # tokens more in a pass: other sizes of matrices, other roundings
_MOST_KEPT = 64  # logits of single texts: with a large vocabulary a megabyte each


@dataclass(frozen=True)
class Judgement:
    """How far logits are from uncached ones of the same text.

    exact: whether they are the same bits; nothing else was measured then. floor: the noise floor of that text; 0 if
    exact. distances: RMS of each step. length: positions of the worst step.
    """

    exact: bool
    floor: float
    distances: tuple[float, ...]
    length: int

    @property
    def ratio(self) -> float:
        """The worst step in noise floors."""
        return 0.0 if self.exact else max(self.distances) / max(self.floor, sys.float_info.min)

    @property
    def wrong(self) -> bool:
        return self.ratio > LIMIT


class Reference:
    """A model without its cache. Like is judged with like: the noise floor of one text judges no other text.

    A floor is the largest difference, over a few steps of the text, between two uncached ways to compute the same
    logits: a pass over the text up to the step, and a longer pass. No floor is below a typical rounding error.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def alone(self, ids: Tensor) -> Tensor:
        """Logits after `ids`, (1, n), in an uncached pass over them: (vocab,)."""
        key = tuple(ids[0].tolist())
        if key not in self._kept:
            if len(self._kept) == _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self.subject(ids, None)[0][0, -1].cpu()
        return self._kept[key]

    def rows(self, ids: Tensor, lengths: Sequence[int], more: int = 1) -> Tensor:
        """Logits after the first `lengths` positions of `ids`, (1, n), each at most n: (len(lengths), vocab).

        One pass gives them all where the model returns logits of all positions. It goes `more` positions further than
        the last length, as far as the context goes, so that it is another way to compute than `alone` is.

        Raises ModelError for logits that are not numbers.
        """
        wanted = [length - 1 for length in lengths]
        end = max(lengths) + more
        passed = torch.cat((ids, ids[:, :1].expand(1, more)), dim=1)[:, :end]
        longest = self.subject.context_length
        if longest is not None and end > longest:
            passed = passed[:, :longest]
        found = self.subject.logits_at(passed, wanted)
        if found is None:
            found = torch.stack([self.alone(ids[:, :length]) for length in lengths])
        found = found.cpu()
        if found.isnan().any():
            raise ModelError("the model's uncached logits are not numbers: there is nothing to compare with")
        return found

    def floor(self, ids: Tensor, longer: Sequence[int] = (1,)) -> float:
        """The noise floor of the logits after `ids`, (1, n), from passes that are longer by so many positions.

        Two passes of nearly one length may round alike by chance, on a text whose logits rounding moves far. So nothing
        is condemned by the default alone, but by `_LONGER`.
        """
        expected, length = self.alone(ids), ids.shape[1]
        measured = (distance(expected, self.rows(ids, [length], more)[0]) for more in longer)
        return max(typical_floor(expected, self.subject.dtype), *measured)

    def same(self, a: Tensor, b: Tensor, ids: Tensor) -> bool:
        """Whether two computations of the logits after `ids`, (vocab,) each, differ by no more than rounding."""
        apart = distance(a.cpu(), b.cpu())
        if apart == 0 or not math.isfinite(apart):
            return apart == 0
        if apart > _FAR * LIMIT * typical_floor(b, self.subject.dtype):
            return False
        return apart <= LIMIT * self.floor(ids) or apart <= LIMIT * self.floor(ids, _LONGER)

    def judge(self, actual: Tensor, expected: Tensor, ids: Tensor, lengths: Sequence[int]) -> Judgement:
        """Hold logits, (steps, vocab), against uncached ones of the same text.

        expected: what `rows` gives for `ids`, (1, n), and `lengths`. What equals either uncached way bit for bit is
        right.
        """
        distances = [distance(*pair) for pair in zip(actual, expected, strict=True)]
        if not any(distances):
            return Judgement(True, 0.0, tuple(distances), lengths[-1])
        worst = max(range(len(lengths)), key=distances.__getitem__)
        floor = typical_floor(expected, self.subject.dtype)
        if math.isfinite(distances[worst]):
            for step in {worst, 0, len(lengths) // 2, len(lengths) - 1}:
                other = self.alone(ids[:, : lengths[step]])
                distances[step] = min(distances[step], distance(actual[step], other))
                floor = max(floor, distance(other, expected[step]))
            worst = max(range(len(lengths)), key=distances.__getitem__)
            if LIMIT * floor < distances[worst] <= _FAR * LIMIT * floor:
                floor = max(floor, self.floor(ids[:, : lengths[worst]], _LONGER))
        return Judgement(not any(distances), floor, tuple(distances), lengths[worst])

    def judge_one(self, actual: Tensor, ids: Tensor) -> Judgement:
        """Hold the logits of one step, (vocab,), against uncached ones after `ids`, (1, n)."""
        expected = self.alone(ids)
        if torch.equal(actual, expected):
            return Judgement(True, 0.0, (0.0,), ids.shape[1])
        length = ids.shape[1]
        return self.judge(actual[None], self.rows(ids, [length]), ids, [length])
