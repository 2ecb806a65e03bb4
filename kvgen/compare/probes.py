"""Uses of a cache beside one token a step: several at once, several rows, a text that was edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from kvgen.compare.case import CALL_ERRORS, Case
from kvgen.errors import in_one_line
from kvgen.rounding import LIMIT, rms


@dataclass(frozen=True)
class Probe:
    """One use of the cache. ratio: its worst step in noise floors; None if the model could not be called so."""

    name: str
    ratio: float | None
    note: str = ""

    @property
    def wrong(self) -> bool:
        return self.ratio is not None and self.ratio > LIMIT


def run_probes(case: Case) -> tuple[Probe, ...]:
    """The uses that this backend's cache must stand; one that it does not foresee is noted and does not count."""
    uses: list[tuple[str, Callable[[Case], Iterator[tuple[Tensor, Tensor]]]]] = [
        ("several new tokens at once", _several_at_once),
        ("rows of a batch", _rows_of_a_batch),
    ]
    if case.backend.rewinds:
        uses.append(("an edited text", _edited_text))
    return tuple(_run(case, name, use) for name, use in uses)


def _run(case: Case, name: str, use: Callable[[Case], Iterator[tuple[Tensor, Tensor]]]) -> Probe:
    try:
        worst = max(float(rms(actual.double() - expected.double())) for actual, expected in use(case))
    except CALL_ERRORS as error:
        return Probe(name, None, f"the model does not do this: {in_one_line(error)}")
    return Probe(name, worst / case.noise.floor)


def _several_at_once(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """The prompt in two parts, then three tokens on each call. Yields logits and what they should be."""
    cache = None
    n = case.ids.shape[1]
    lengths = [case.start // 2, *range(case.start, n, 3)]
    for length in filter(None, lengths):
        logits, cache = case.backend(case.ids[:, :length], cache)
        if length >= case.start:
            yield logits[0, -1].cpu(), case.noise.exact[length - case.start]


def _rows_of_a_batch(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """The text beside the same text backwards: each row must be as if it were alone."""
    both = case.ids.repeat(2, 1)
    both[1] = both[1].flip(0)
    cache = None
    for length in range(case.start, min(case.start + 4, case.ids.shape[1])):
        logits, cache = case.backend(both[:, :length], cache)
        yield logits[0, -1].cpu(), case.noise.exact[length - case.start]
        yield logits[1, -1].cpu(), case.alone(both[1:, :length])


def _edited_text(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole text; then its last token replaced, back to the prompt, and a token inside the prompt replaced.

    Each leaves one position to compute, so that this asks nothing of calls with several new tokens.
    """
    _, cache = case.backend(case.ids, None)
    for length in (case.ids.shape[1], case.start + 1, case.start // 2 + 1):
        edited = case.ids[:, :length].clone()
        edited[:, -1] = case.ids[0, 0] if length > case.start + 1 else case.ids[0, -1]
        logits, cache = case.backend(edited, cache)
        yield logits[0, -1].cpu(), case.alone(edited)
