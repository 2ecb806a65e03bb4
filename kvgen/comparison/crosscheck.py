"""Hold one engine's uncached logits against another's on the same checkpoint and text, and find the kind of cause.

Nothing here knows an engine. What rounding explains is measured on the same text: in the engines themselves, and in
kvgen with weights, activations or cached values rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from kvgen.comparison.case import Case, random_text
from kvgen.comparison.metrics import Gap, gap
from kvgen.comparison.reference import Reference
from kvgen.comparison.rounding import LIMIT, NARROW, distance, size, typical_floor
from kvgen.comparison.roundings import Roundings, roundings
from kvgen.comparison.subjects import Subject, subject_of
from kvgen.comparison.trial import Finding
from kvgen.loading.load import Loaded

_LONG = 160  # positions of the text, if no window needs more
_LONGEST_WINDOW, _BEYOND = 1100, 40
_DENSE = 24  # lengths up to here are all compared; beyond, each an eighth longer
_OTHER_ROUNDING = 16  # more positions in a pass, which then rounds differently
# measured roundings that a difference may have: two engines round, in blocks of other sizes; differences in a rounding
_EXPLAINS, _NO_LARGER = 3.0, 10.0
_VANISHED, _SMALL = 1 / 50, 1 / 12  # of the difference on the text: rounding never vanishes where attention is idle
_REPEATED, _SINGLES = 24, 6  # positions of a text of one token repeated; texts of one token
_SHORTEST_WINDOW = 4
_ENLARGED = 1000.0  # noise floors; a model that enlarges its own rounding is not looked for beyond
_RELATED = 0.5  # correlation of two models' logits above which they share most weights
_PROPORTIONAL = 1e-3  # of the logits' size, around a straight line


class Agreement(str, Enum):
    """EQUAL: within the rounding of either engine. ROUNDED: further apart, by what rounding of weights, activations or
    cached values is measured to do. DIFFERENT: neither; or the engines read the prompt as different tokens."""

    EQUAL = "equal within rounding"
    ROUNDED = "rounded differently"
    DIFFERENT = "different"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class CrossCheck:
    """One engine against a reference.

    gap: over the steps of the compared text. rms, limit: the largest RMS difference of a step of the longer text, and
    what rounding of the engines themselves explains. length: positions of the first step beyond it. positions: of the
    longer text.
    """

    reference: str
    agreement: Agreement
    gap: Gap
    rms: float
    limit: float
    positions: int
    length: int | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def acceptable(self) -> bool:
        return self.agreement is not Agreement.DIFFERENT


def cross_check(
    loaded: Loaded,
    reference: Loaded,
    ids: Sequence[int],
    start: int,
    prompt: str = "",
    variants: Roundings | None = None,
) -> CrossCheck:
    """Compare uncached logits of two engines.

    ids: the text, prompt and completion. start: length of the prompt. prompt: its text, which both are to read as the
    same tokens; "" to leave that out. variants: see `Roundings`; None to load them from
    the checkpoint of `loaded`.

    Raises ModelError if logits are NaN.
    """
    pair = _Pair(subject_of(loaded.model), subject_of(reference.model))
    findings = [*_tokens_differ(loaded, reference, prompt), *pair.widths_differ()]
    text = pair.extended(torch.tensor([list(ids)]), loaded.tokenizer.special_ids)
    seen = pair.see(text, _lengths(text.shape[1]))
    steps = range(start, len(ids))
    both = pair.logits(text, steps)
    found = CrossCheck(
        reference.model.name,
        Agreement.EQUAL,
        gap(both[1], both[0], torch.tensor(list(ids[start:]))),
        max(seen.apart),
        seen.limit,
        text.shape[1],
        seen.first_wrong,
    )
    agreement, causes = _judge(pair, text, seen, variants or (lambda: roundings(loaded.source)))
    if any(finding.name == "tokenizer" for finding in findings):
        agreement = Agreement.DIFFERENT
    length = found.length if agreement is Agreement.DIFFERENT else None
    return CrossCheck(**{**vars(found), "agreement": agreement, "length": length, "findings": (*findings, *causes)})


@dataclass(frozen=True)
class _Seen:
    """Two engines on one text: their RMS difference after each of `lengths` positions, and the limit of rounding."""

    lengths: Sequence[int]
    apart: Sequence[float]
    limit: float
    size: float

    @property
    def first_wrong(self) -> int | None:
        return next((n for n, apart in zip(self.lengths, self.apart, strict=True) if apart > self.limit), None)


class _Pair:
    """The engine and its reference, with references of each for their uncached logits."""

    def __init__(self, *subjects: Subject) -> None:
        self.subjects = subjects
        self._references = [Reference(subject) for subject in subjects]

    def logits(self, ids: Tensor, lengths: Sequence[int], more: int = 1) -> list[Tensor]:
        """Logits of both, (len(lengths), vocab) each, of the tokens that both have."""
        found = [
            reference.step_logits(ids.to(reference.subject.backend.device), lengths, more).float()
            for reference in self._references
        ]
        width = min(logits.shape[1] for logits in found)
        return [logits[:, :width] for logits in found]

    def see(self, ids: Tensor, lengths: Sequence[int]) -> _Seen:
        both, again = self.logits(ids, lengths), self.logits(ids, lengths, _OTHER_ROUNDING)
        floors = [typical_floor(logits, subject.dtype) for logits, subject in zip(both, self.subjects, strict=True)]
        floors += [max(map(distance, *pair)) for pair in zip(both, again, strict=True)]
        apart = list(map(distance, *both))
        if max(floors) < max(apart) / LIMIT <= _ENLARGED * max(floors):
            floors += self._own_rounding(ids, lengths, both)
        return _Seen(lengths, apart, LIMIT * max(floors), size(both[1]))

    def _own_rounding(self, ids: Tensor, lengths: Sequence[int], both: Sequence[Tensor]) -> Iterator[float]:
        """How far each engine is from itself in float64, where it can: a model may enlarge its own rounding, as a sharp
        softmax does."""
        for subject, logits in zip(self.subjects, both, strict=True):
            if subject.dtype == torch.float32 and (twin := subject.in_dtype(torch.float64)):
                exact = Reference(twin).step_logits(ids, lengths).float()
                yield max(map(distance, logits, exact[:, : logits.shape[1]].to(logits.device)))

    def extended(self, ids: Tensor, special_ids: frozenset[int]) -> Tensor:
        """The text with random tokens after it, past the windows of either engine, within both contexts, (1, n)."""
        changes = [n for subject in self.subjects for n in subject.changes_at or () if n <= _LONGEST_WINDOW]
        contexts = [n for subject in self.subjects if (n := subject.context_length)]
        length = min([max([_LONG, *(n + _BEYOND for n in changes)]), *contexts])
        (expected, _) = self.logits(ids, [ids.shape[1]])
        return random_text(Case(self._references[0], ids, 1, expected, special_ids), max(length, ids.shape[1]))

    def widths_differ(self) -> Iterator[Finding]:
        one, other = (subject.backend.vocab_size for subject in self.subjects)
        if one and other and one != other:
            yield Finding(
                "vocabulary",
                f"The engines have {one} and {other} tokens.",
                "logits of those that both have are compared",
            )

    def sharp(self) -> _Pair:
        """In float32 where an engine computes in 16 bits and can, else itself."""
        twins = [subject.in_dtype(torch.float32) if subject.dtype in NARROW else None for subject in self.subjects]
        if not any(twins):
            return self
        return _Pair(*(twin or subject for twin, subject in zip(twins, self.subjects, strict=True)))


def _lengths(last: int) -> list[int]:
    lengths = list(range(1, min(_DENSE, last) + 1))
    while lengths[-1] < last:
        lengths.append(min(last, lengths[-1] + lengths[-1] // 8))
    return lengths


def _tokens_differ(loaded: Loaded, reference: Loaded, prompt: str) -> Iterator[Finding]:
    one, other = loaded.tokenizer.encode(prompt), reference.tokenizer.encode(prompt)
    if one != other:
        place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        yield Finding(
            "tokenizer",
            "The engines read the prompt as different tokens; the logits below are of the same ones.",
            f"{len(one)} and {len(other)} tokens; from token {place + 1} on {one[place:][:5]} and {other[place:][:5]}",
        )


def _judge(pair: _Pair, text: Tensor, seen: _Seen, variants: Roundings) -> tuple[Agreement, list[Finding]]:
    sharp = pair.sharp()
    seen_sharp = seen if sharp is pair else sharp.see(text, seen.lengths)
    if seen_sharp.first_wrong is None:
        if seen.first_wrong is None:
            return Agreement.EQUAL, []
        evidence = f"in float32 they are {max(seen_sharp.apart):.2g} (RMS) apart, else {max(seen.apart):.2g}"
        return Agreement.ROUNDED, [Finding("arithmetic", "The engines compute in different precision.", evidence)]
    repeated = text[:, :1].expand(1, min(_REPEATED, text.shape[1]))
    constant = sharp.see(repeated, range(1, repeated.shape[1] + 1))
    singles = [sharp.see(text[:, i : i + 1], [1]) for i in range(min(_SINGLES, text.shape[1]))]
    idle = max(apart for one in (constant, *singles) for apart in one.apart)
    if idle > _VANISHED * max(seen_sharp.apart) and (finding := _rounding(sharp, text, seen_sharp, variants)):
        return Agreement.ROUNDED, [finding]
    return Agreement.DIFFERENT, [_cause(sharp, text, seen_sharp, constant, singles)]


def _rounding(pair: _Pair, text: Tensor, seen: _Seen, variants: Roundings) -> Finding | None:
    """The least rounding, as kvgen measures it on the text, that explains how far the engines are apart; better, one
    that gives the logits of an engine."""
    exact: Tensor | None = None
    engines, worst = pair.logits(text, seen.lengths), max(seen.apart)
    explanations: list[tuple[bool, bool, float, str, str]] = []
    for kind, words, model in variants():
        subject = subject_of(model)
        if subject.dtype in NARROW:  # only its weights are of interest
            subject = subject.in_dtype(torch.float32) or subject
        rounded = Reference(subject).step_logits(text, seen.lengths).float()[:, : engines[0].shape[1]]
        exact = rounded if exact is None else exact
        rounding = max(map(distance, rounded, exact))
        guessed = min(max(map(distance, rounded, logits)) for logits in engines) > _SMALL * worst
        if worst <= _EXPLAINS * rounding and not (guessed and kind == "weights"):
            explanations.append((kind != "order of sums", guessed, rounding, kind, words))
    if not explanations:
        return None
    _, guessed, rounding, kind, words = min(explanations)
    if rounding > _NO_LARGER * worst:
        evidence = f"{worst:.2g} (RMS) apart; the least of these, {words}, changes the logits by {rounding:.2g}"
        return Finding("rounding", "The difference is smaller than all roundings that were measured.", evidence)
    evidence = f"{worst:.2g} (RMS) apart; in kvgen, {words} change the logits of this text by {rounding:.2g}"
    evidence += "" if guessed else ", to those of one of the engines"
    return Finding(kind, f"The difference is one of rounding: {words}.", evidence)


def _cause(pair: _Pair, text: Tensor, seen: _Seen, constant: _Seen, singles: Sequence[_Seen]) -> Finding:
    """What texts of one token, and of one repeated, tell: there attention finds the same, whatever it looks for."""
    worst, single = max(seen.apart), max(max(one.apart) for one in singles)
    same = max(max(one.limit for one in singles), _SMALL * worst)
    if single > same:
        return _from_the_first(pair, text, single)
    if max(constant.apart) > max(constant.limit, _SMALL * worst):
        return Finding(
            "positions",
            "Positions or states differ: learned positions, or what a layer carries from token to token.",
            f"single tokens agree ({single:.2g}), one token repeated does not ({max(constant.apart):.2g})",
        )
    alike = f"single tokens and one token repeated agree ({max(single, *constant.apart):.2g})"
    first = _first_length(pair, text, seen)
    if first > _SHORTEST_WINDOW and seen.limit < _VANISHED * worst:  # else a smaller difference may be hidden before
        return Finding(
            "window",
            f"Texts of up to {first - 1} tokens agree and longer ones do not: a window, or where positions are scaled.",
            f"{alike}; {worst:.2g} (RMS) apart at worst",
        )
    growth = (
        f"{seen.apart[1]:.2g} (RMS) apart at {seen.lengths[1]} positions, {seen.apart[-1]:.2g} at {seen.lengths[-1]}"
    )
    return Finding(
        "positions",
        "Attention finds other keys: the rotation of positions differs (its base, scaling or order), or the scale of "
        "the scores.",
        f"{alike}, so weights and norms do; {growth}",
    )


def _first_length(pair: _Pair, text: Tensor, seen: _Seen) -> int:
    """The first length that differs, of all lengths: those looked at may be far apart."""
    first = next(i for i, apart in enumerate(seen.apart) if apart > seen.limit)
    between = range(seen.lengths[first - 1] + 1 if first else 1, seen.lengths[first] + 1)
    apart = map(distance, *pair.logits(text, between))
    return next(n for n, found in zip(between, apart, strict=True) if found > seen.limit or n == between[-1])


def _from_the_first(pair: _Pair, text: Tensor, single: float) -> Finding:
    one, other = (logits.double() for logits in pair.logits(text[:, :1], [1]))
    slope = float(one[0] @ other[0] / (other[0] @ other[0]))
    correlation = float(torch.corrcoef(torch.cat((one, other)))[0, 1])
    if math.sqrt(max(0.0, 1 - correlation**2)) < _PROPORTIONAL:
        return Finding(
            "scale",
            f"The logits are {slope:.4g} times the reference's.",
            f"correlation {correlation:.7f} after one token",
        )
    far = f"after one token {single:.2g} (RMS) apart, correlation {correlation:.3f}"
    if correlation < _RELATED:
        return Finding("other weights", "The weights are others, or tensors are read in another order.", far)
    return Finding("weights", "Some weights, a norm, a scale or an activation function differ.", far)
