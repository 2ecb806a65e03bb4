"""Explain why a pattern differs, with the evidence from experiments and probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from kvgen.comparison.case import CALL_ERRORS, Case, make_case
from kvgen.comparison.experiments import OBSERVATIONS, PREDICTIONS, STAYS, VALUES_WRONG, attempt, lookup_or_values
from kvgen.comparison.patterns import Pattern
from kvgen.comparison.probes import Probe
from kvgen.comparison.reference import Judgement
from kvgen.comparison.rounding import LIMIT, distance, size, typical_floor
from kvgen.comparison.run import run_forced
from kvgen.comparison.shape import few_logits, is_like_rounding
from kvgen.comparison.trial import Finding, Trial, nondeterministic

_LEAK = 64  # typical rounding errors; a model that reads later tokens differs by far more
_FAR_LESS = 10.0  # times
_SMALL = 2**-5  # relative to the size of the logits
_EVEN_STEPS, _EVEN = 4, 10.0  # steps to see; the largest difference of a step relative to the smallest
_PROMPT = (4, 24)  # shortest and longest prompt to experiment on, in tokens


def unreliable_reference(case: Case, alone: Mapping[int, Tensor]) -> tuple[float, list[Finding]]:
    """Check that the uncached model is deterministic and causal: otherwise nothing can be compared with it.

    alone: uncached logits of the prompt and of longer prefixes of the text, by length. Return the largest |difference|
    between these and one pass over the whole text, and findings if the reference is unreliable.
    """
    gaps = [(logits, case.expected[length - case.start]) for length, logits in alone.items()]
    largest = max(float((a.double() - b.double()).abs().nan_to_num(0).max()) for a, b in gaps)
    first, second = alone[case.start], case.subject.uncached(case.ids[:, : case.start])[0, -1].cpu()
    # The measured noise floor is useless here: in a model that is not deterministic it is large.
    if distance(first, second) > LIMIT * typical_floor(first, case.subject.dtype):
        return largest, [nondeterministic(case.subject, float((first - second).abs().max()))]
    sharp = case.sharp
    if sharp is not case:
        gaps = [(sharp.last_logits(case.ids[:, :length]), sharp.expected[length - case.start]) for length in alone]
    leak = max(distance(a, b) for a, b in gaps)
    if leak <= _LEAK * typical_floor(sharp.expected, sharp.subject.dtype):
        return largest, []
    if leak <= _SMALL * size(sharp.expected) and _FAR_LESS * _changed_later(sharp) <= leak:
        sharp.reference.least_floor = leak  # it computes in fewer bits than its logits have
        return largest, []
    finding = Finding(
        "not causal",
        "The model is not causal: later tokens change the logits of earlier positions. No cache can be right.",
        f"a pass over the whole text and a pass over a prefix differ by {leak:.2g} (RMS) at the same position",
    )
    return largest, [finding]


def _changed_later(case: Case) -> float:
    """How far logits change with later tokens alone, in passes of the same length, which round alike: not at all in a
    model that is causal, however coarsely it rounds."""
    half = (case.start + case.ids.shape[1]) // 2
    other = case.ids.clone()
    other[:, half:] = case.ids[:, :1]
    lengths = [length for length in case.lengths if length <= half]
    found = case.reference.step_logits(other, case.lengths)[: len(lengths)]
    return max(distance(*pair) for pair in zip(found, case.expected, strict=False))


def diagnose(
    case: Case, pattern: Pattern, logits: Tensor, judged: Judgement, probes: tuple[Probe, ...], *, wrong: bool
) -> list[Finding]:
    """Return the explanations that fit a pattern's result.

    logits: what the pattern returned, (steps, vocab). judged: their distance from uncached logits. wrong: the verdict.

    Empty if a right pattern is right; otherwise at least one finding, possibly "unexplained".
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
    if judged.first_wrong is None and sharp is case and case.wider is not None:
        sharp = case.wider  # which decided that it is wrong
    if sharp is not case:
        logits = run_forced(pattern.call(sharp.subject), sharp.ids, sharp.start).logits
        judged = sharp.judge(logits)
    step = judged.first_wrong
    if step is None:
        return [_unexplained(case, judged, "the difference vanishes in a wider dtype")]
    trial = _with_another_prompt(sharp, pattern) or Trial(
        sharp, pattern, pattern.call(sharp.subject), sharp.lengths[step], logits[step]
    )
    for experiment in PREDICTIONS:
        if finding := attempt(experiment, trial):
            return [finding]
    if few := few_logits(sharp, logits, judged):
        return [few]
    if found := [finding for experiment in OBSERVATIONS if (finding := attempt(experiment, trial))]:
        return found
    finding, large = attempt(lookup_or_values, trial), max(judged.distances) > _SMALL * size(sharp.expected)
    if finding is not None and large:
        return [finding]
    if large and not trial.places:
        return [_unexplained(sharp, judged, "positions could not be tested: the model does not accept any")]
    if finding is not None and finding.name == VALUES_WRONG and _is_even(judged) and attempt(is_like_rounding, trial):
        return [_fewer_bits(sharp, judged)]
    return [_unexplained(sharp, judged)]


def _with_another_prompt(case: Case, pattern: Pattern) -> Trial | None:
    """A trial with a prompt of 4 to 24 tokens: shorter ones are ambiguous, longer ones make experiments slow.

    None if the prompt has such a length already, or if the pattern is right with the other prompt.
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
    step = other.judge(logits).first_wrong
    if step is None:
        return None
    return Trial(other, pattern, pattern.call(case.subject), other.lengths[step], logits[step])


def _is_even(judged: Judgement) -> bool:
    """Whether all steps but the first, the prompt, are wrong by a similar small amount."""
    apart = judged.distances[1:]
    return len(apart) >= _EVEN_STEPS and min(apart) > max(LIMIT * judged.floor, max(apart) / _EVEN)


def _fewer_bits(case: Case, judged: Judgement) -> Finding:
    part = max(judged.distances) / size(case.expected)
    return Finding(
        "lower precision",
        "Cached logits are a little off at every step: the cache, or the arithmetic of cached calls, has fewer bits, "
        "adds noise, scales by almost 1, or approximates.",
        f"every cached step differs a little, at most by {part:.1e} of the logits' size, all over the vocabulary, "
        f"without a scale, a shift or a pattern that repeats; {STAYS}",
    )


def _unexplained(case: Case, judged: Judgement, more: str = "") -> Finding:
    part = max(judged.distances) / size(case.expected)
    evidence = f"{judged.ratio:.2g} noise floors, {part:.1e} of the logits' size, at {judged.length} positions"
    return Finding("unexplained", "None of the known explanations fits.", "; ".join(filter(None, (evidence, more))))


def _not_numbers(length: int) -> Finding:
    return Finding(
        "not a number",
        "Cached calls return NaN or infinity where uncached calls return numbers.",
        f"first after {length} positions",
    )


def _from_probes(wrong: Sequence[Probe]) -> list[Finding]:
    """One finding for each kind of wrong use, without those that another one explains."""
    found: dict[str, Finding] = {}
    for probe in wrong:
        if any(_explains(other, probe) for other in wrong):
            continue
        name, text = probe.finding
        far = probe.note or f"{probe.ratio:.2g} times the noise, first after {probe.length} positions"
        far += f" ({probe.step})" if probe.step else ""
        far += f"; the logits are those of {probe.like}" if probe.like else ""
        found.setdefault(name, Finding(name, text, f"{probe.name}: {far}"))
    return list(found.values())


def _explains(other: Probe, probe: Probe) -> bool:
    """Whether one wrong use is the reason for another.

    Edits and rewinds leave several tokens to compute at once, as other texts do, and texts in large chunks are long.
    What returns the logits of a text computed before may do so everywhere. Padded rows are rows.
    """
    kind, reason = probe.finding[0], other.finding[0]
    if reason == "stale state" and other.like and not probe.like:
        return True
    if kind == "padding":
        return reason == "rows mixed"
    earlier = other.length is not None and probe.length is not None and other.length <= probe.length
    longer = reason == "longer texts" and earlier
    if kind in ("edits not noticed", "stale state") and not probe.like and probe.name != "rewinds":
        return longer or reason in ("multi-token calls", "chunk boundary")
    return kind == "chunk boundary" and longer


def _harmless(pattern: Pattern, judged: Judgement) -> Finding:
    """Why a wrong pattern is harmless on this model."""
    evidence = "identical bits" if judged.exact else "equal to uncached decoding within rounding error"
    return Finding("harmless here", pattern.harmless, f"logits: {evidence}")
