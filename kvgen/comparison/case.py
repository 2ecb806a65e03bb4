"""What a comparison knows of the model and the text in hand, shared by probes and diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvgen.comparison.reference import Judgement, Reference
from kvgen.comparison.subjects import Subject
from kvgen.errors import KvgenError

# What a library may raise when it is called in a way that it does not foresee, as wrong patterns do.
CALL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, KvgenError)

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One model on one text.

    reference: the model, uncached. ids: the text, (1, n). start: how many of them are the prompt.
    expected: uncached logits after start, start + 1, ... n - 1 positions, (steps, vocab).
    special_ids: of tokens that text does not contain by itself, such as the one that ends a turn.
    """

    reference: Reference
    ids: Tensor
    start: int
    expected: Tensor
    special_ids: frozenset[int] = frozenset()

    @property
    def subject(self) -> Subject:
        return self.reference.subject

    @property
    def lengths(self) -> range:
        """How many positions stand before each step's logits."""
        return range(self.start, self.ids.shape[1])

    @property
    def targets(self) -> Tensor:
        """What the text goes on with at each step, (steps,) int64 on the CPU."""
        return self.ids[0, self.start :].cpu()

    def judge(self, logits: Tensor) -> Judgement:
        """Hold the logits of a pattern, (steps, vocab), against the uncached ones."""
        steps = len(logits)
        return self.reference.judge(logits, self.expected[:steps], self.ids, self.lengths[:steps])

    def alone(self, ids: Tensor) -> Tensor:
        """Uncached logits after `ids`, (1, n): (vocab,)."""
        return self.reference.alone(ids)

    def same(self, a: Tensor, b: Tensor, ids: Tensor) -> bool:
        """Whether two computations of the logits after `ids`, (vocab,) each, differ by no more than rounding."""
        return self.reference.same(a, b, ids)

    @cached_property
    def wider(self) -> Case | None:
        """The case in the next wider dtype, where rounding hides less; None if the model cannot compute so."""
        twin = self.subject.in_wider(torch.float32 if self.subject.dtype in _NARROW else torch.float64)
        return None if twin is None else make_case(Reference(twin), self.ids, self.start, self.special_ids)

    @property
    def sharp(self) -> Case:
        """The case to experiment on: 16 bits hide too much."""
        return self.wider or self if self.subject.dtype in _NARROW else self


def make_case(reference: Reference, ids: Tensor, start: int, special_ids: frozenset[int] = frozenset()) -> Case:
    """Compute the uncached logits of a text. Raises ModelError for logits that are not numbers."""
    return Case(reference, ids, start, reference.rows(ids, range(start, ids.shape[1])), special_ids)


def random_text(case: Case, length: int, seed: int = 0) -> Tensor:
    """The case's text and, behind it, random ordinary tokens: (1, length)."""
    count, present = case.expected.shape[1], case.ids.shape[1]
    generator = torch.Generator().manual_seed(seed)
    ordinary = [int(id_) for id_ in torch.randint(0, count, (4 * length,), generator=generator)]
    ordinary = [id_ for id_ in ordinary if id_ not in case.special_ids][: max(0, length - present)]
    more = torch.tensor([ordinary], dtype=case.ids.dtype, device=case.ids.device)
    return torch.cat((case.ids, more), dim=1)[:, :length]
