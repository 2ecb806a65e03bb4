"""A model and a text under comparison, with its uncached logits: shared by probes and diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvgen.comparison.reference import Judgement, Reference
from kvgen.comparison.rounding import NARROW
from kvgen.comparison.subjects import Subject
from kvgen.errors import KvgenError

# What a library may raise when it is called in an unexpected way, as wrong patterns do.
CALL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, KvgenError)


@dataclass(frozen=True)
class Case:
    """One model on one text.

    reference: the model without its cache. ids: the text, (1, n). start: length of the prompt.
    expected: uncached logits after start, start + 1, ... n - 1 positions, (steps, vocab).
    special_ids: special tokens, such as the one that ends a turn.
    cache: after the right pattern on the text, to go on from. familiar: whether longer texts consist of its tokens.
    """

    reference: Reference
    ids: Tensor
    start: int
    expected: Tensor
    special_ids: frozenset[int] = frozenset()
    cache: Any = None
    familiar: bool = False

    @property
    def subject(self) -> Subject:
        return self.reference.subject

    @property
    def lengths(self) -> range:
        """Number of positions before each step's logits."""
        return range(self.start, self.ids.shape[1])

    @property
    def targets(self) -> Tensor:
        """The next token of the text at each step, (steps,) int64 on the CPU."""
        return self.ids[0, self.start :].cpu()

    def judge(self, logits: Tensor) -> Judgement:
        """Compare the logits of a pattern, (steps, vocab), with uncached ones."""
        steps = len(logits)
        return self.reference.judge(logits, self.expected[:steps], self.ids, self.lengths[:steps])

    def last_logits(self, ids: Tensor) -> Tensor:
        """Uncached logits after `ids`, (1, n): (vocab,)."""
        return self.reference.last_logits(ids)

    def close(self, a: Tensor, b: Tensor, ids: Tensor) -> bool:
        """Whether two results for the logits after `ids`, (vocab,) each, are equal within rounding error."""
        return self.reference.close(a, b, ids)

    @cached_property
    def wider(self) -> Case | None:
        """The same case in the next wider dtype, where rounding hides less; None if the model does not support it, or
        rounds to fewer bits whatever its dtype."""
        if self.subject.dtype == torch.float64 or self.reference.least_floor:
            return None
        wider = self.reference.wider
        return None if wider is None else make_case(wider, self.ids, self.start, self.special_ids)

    @property
    def sharp(self) -> Case:
        """The case to experiment on: in float32 for a 16-bit model, since 16 bits hide too much."""
        return self.wider or self if self.subject.dtype in NARROW else self


def make_case(reference: Reference, ids: Tensor, start: int, special_ids: frozenset[int] = frozenset()) -> Case:
    """Compute the uncached logits of a text. Raises ModelError if they are NaN."""
    return Case(reference, ids, start, reference.text_logits(ids, start), special_ids)


def random_text(case: Case, length: int) -> Tensor:
    """The text of the case, extended with random ordinary tokens, or random ones of its own, to (1, length)."""
    count, present = case.expected.shape[1], case.ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    if case.familiar:
        places = torch.randint(0, max(1, present - 1), (max(0, length - present),), generator=generator)
        return torch.cat((case.ids, case.ids[:, places.to(case.ids.device)]), dim=1)[:, :length]
    ordinary = [int(id_) for id_ in torch.randint(0, count, (4 * length,), generator=generator)]
    ordinary = [id_ for id_ in ordinary if id_ not in case.special_ids][: max(0, length - present)]
    more = torch.tensor([ordinary], dtype=case.ids.dtype, device=case.ids.device)
    return torch.cat((case.ids, more), dim=1)[:, :length]


def another(case: Case, id_: int) -> int:
    """A different token of the text."""
    return next((other for other in case.ids[0].tolist() if other != id_), (id_ + 1) % case.expected.shape[1])


def changed(case: Case, ids: Tensor, place: int) -> Tensor:
    """A copy of `ids`, (1, n), with a different token at one place."""
    ids = ids.clone()
    ids[0, place] = another(case, int(ids[0, place]))
    return ids


def swapped(text: Tensor) -> Tensor:
    """A text, (1, n), with two neighbours swapped that differ, if there are any."""
    ids = text[0].tolist()
    place = next((place for place in range(1, len(ids) - 1) if ids[place] != ids[place - 1]), 0)
    ids[place - 1 : place + 1] = reversed(ids[place - 1 : place + 1])
    return text.new_tensor([ids])
