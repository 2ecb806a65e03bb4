"""Why a pattern differs: what the experiments leave standing, with its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from kvgen.comparison.case import CALL_ERRORS, Case, make_case
from kvgen.comparison.experiments import EXPERIMENTS, Finding, Trial, attempt, lookup_or_values, nondeterministic
from kvgen.comparison.patterns import Pattern
from kvgen.comparison.probes import Probe
from kvgen.comparison.reference import Judgement
from kvgen.comparison.rounding import LIMIT, distance, size, typical_floor
from kvgen.comparison.run import run_forced

_LEAK = 64  # typical rounding errors: what leaks from the future is far more
_SMALL = 2**-5  # of the size of the logits
_PROMPT = (4, 24)  # tokens, at least and at most, of a text to experiment on


def unreliable_reference(case: Case, alone: Mapping[int, Tensor]) -> tuple[float, list[Finding]]:
    """Find what forbids to compare: a reference that is not deterministic, or not causal.

    alone: uncached logits of a few beginnings of the text, by their length. Also returns the largest |difference|
    between these and one pass over the whole text.
    """
    gaps = [(logits, case.expected[length - case.start]) for length, logits in alone.items()]
    largest = max(float((a.double() - b.double()).abs().nan_to_num(0).max()) for a, b in gaps)
    first, second = (case.subject(case.ids[:, : case.start], None)[0][0, -1].cpu() for _ in range(2))
    # Not held against the measured noise: where chance is at work, that is large.
    if distance(first, second) > LIMIT * typical_floor(first, case.subject.dtype):
        return largest, [nondeterministic(case.subject, float((first - second).abs().max()))]
    sharp = case.sharp
    if sharp is not case:
        gaps = [(sharp.alone(case.ids[:, :length]), sharp.expected[length - case.start]) for length in alone]
    leak = max(distance(a, b) for a, b in gaps)
    if leak <= _LEAK * typical_floor(sharp.expected, sharp.subject.dtype):
        return largest, []
    finding = Finding(
        "not causal",
        "The model is not causal: what comes after a position changes its logits. No cache can be right.",
        f"one pass over the text and a pass over its beginning differ by {leak:.2g} (RMS) at the same position",
    )
    return largest, [finding]


def diagnose(
    case: Case, pattern: Pattern, logits: Tensor, judged: Judgement, probes: tuple[Probe, ...], *, wrong: bool
) -> list[Finding]:
    """The explanations that survive for a pattern on a case.

    logits: what the pattern returned, (steps, vocab). judged: how far they are from the reference's. wrong: the
    verdict on them.

    Empty for a right pattern that is right; otherwise at least one, if only that nothing explains it.
    """
    if not wrong:
        found = [] if pattern.right else [_harmless(pattern, judged)]
        return found + _from_probes([probe for probe in probes if probe.wrong])
    broken = [
        bool((row.isfinite() < expected.isfinite()).any()) for row, expected in zip(logits, case.expected, strict=True)
    ]
    if any(broken):
        return [_not_numbers(case.lengths[broken.index(True)])]
    sharp = case.sharp
    if sharp is not case:
        logits = run_forced(pattern.call(sharp.subject), sharp.ids, sharp.start).logits
        judged = sharp.judge(logits)
    step = _first_wrong(judged)
    if step is None:
        return [_unexplained(case, judged, "it vanishes in a wider dtype")]
    trial = _with_another_prompt(sharp, pattern) or Trial(
        sharp, pattern, pattern.call(sharp.subject), sharp.lengths[step], logits[step]
    )
    found = [finding for experiment in EXPERIMENTS if (finding := attempt(experiment, trial))]
    for alone in ("not deterministic", "context lost"):
        only = [finding for finding in found if finding.name == alone]
        if only:  # then order and distance do not matter either, which says nothing more
            return only
    if found:
        return found
    if max(judged.distances) > _SMALL * size(sharp.expected):
        return [attempt(lookup_or_values, trial) or _unexplained(sharp, judged)]
    return [_unexplained(sharp, judged)]


def _first_wrong(judged: Judgement) -> int | None:
    """The index of the first step that is wrong."""
    return next((step for step, apart in enumerate(judged.distances) if apart > LIMIT * judged.floor), None)


def _with_another_prompt(case: Case, pattern: Pattern) -> Trial | None:
    """A trial behind a prompt of a few tokens: with fewer, positions coincide, with many, each experiment takes long.

    None if the prompt is such a one, or if the pattern is right behind another.
    """
    shortest, longest = _PROMPT
    if shortest <= case.start <= longest or case.ids.shape[1] < shortest + 2:
        return None
    if case.start < shortest:
        other = replace(case, start=shortest, expected=case.expected[shortest - case.start :])
    else:
        other = make_case(case.reference, case.ids[:, case.start - longest :], longest)
    try:
        logits = run_forced(pattern.call(case.subject), other.ids, other.start).logits
    except CALL_ERRORS:
        return None
    step = _first_wrong(other.judge(logits))
    if step is None:
        return None
    return Trial(other, pattern, pattern.call(case.subject), other.lengths[step], logits[step])


def _unexplained(case: Case, judged: Judgement, more: str = "") -> Finding:
    part = max(judged.distances) / size(case.expected)
    evidence = f"{judged.ratio:.2g} noise floors, {part:.1e} of the size of the logits, at {judged.length} positions"
    return Finding("unexplained", "None of the known explanations fits.", "; ".join(filter(None, (evidence, more))))


def _not_numbers(length: int) -> Finding:
    return Finding(
        "not a number",
        "Calls with the cache return NaN or infinities where uncached ones return numbers.",
        f"first after {length} positions",
    )


_OF_PROBES = {
    "several new tokens at once": ("multi-token calls", "Calls with several new tokens are wrong."),
    "rows of a batch": ("rows mixed", "The rows of a batch are mixed up: a row is not as if it were alone."),
    "two sequences in turn": (
        "sequences mixed",
        "Two sequences with a cache each are mixed up: one is not as if the other were not there.",
    ),
    "edits": ("edits not noticed", "The cache is wrong after the text was edited."),
    "rewinds": ("edits not noticed", "The cache is wrong after the last tokens were taken back."),
    "special tokens": ("special tokens", "Texts with special tokens in them are wrong."),
    "more steps": ("longer texts", "The first steps are right, and further ones are wrong."),
    "long texts": ("longer texts", "Long texts are wrong, and short ones are not."),
    "past a window": ("longer texts", "Texts longer than a window are wrong, and short ones are not."),
}


def _from_probes(wrong: Sequence[Probe]) -> list[Finding]:
    """One finding for each kind of use that is wrong. An edit leaves several tokens to compute: if these are wrong
    without an edit, too, it says nothing more."""
    names = {probe.name for probe in wrong}
    found: dict[str, Finding] = {}
    for probe in wrong:
        if probe.name == "edits" and "several new tokens at once" in names:
            continue
        name, text = _OF_PROBES[probe.name]
        far = probe.note or f"{probe.ratio:.2g} times the noise, first after {probe.length} positions"
        found.setdefault(name, Finding(name, text, f"{probe.name}: {far}"))
    return list(found.values())


def _harmless(pattern: Pattern, judged: Judgement) -> Finding:
    """Why a wrong pattern does no harm on this model."""
    evidence = "the same bits" if judged.exact else "no further from uncached decoding than rounding"
    return Finding("harmless here", pattern.harmless, f"its logits: {evidence}")
