"""Run every pattern on the same text; give each a verdict, and a reason where it differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvgen.comparison.case import CALL_ERRORS, Case, make_case
from kvgen.comparison.diagnosis import diagnose, unreliable_reference
from kvgen.comparison.metrics import Gap, gap
from kvgen.comparison.patterns import FULL_SEQUENCE, PATTERNS, UNCACHED, Pattern
from kvgen.comparison.probes import Probe, Progress, run_probes
from kvgen.comparison.reference import Judgement, Reference
from kvgen.comparison.rounding import BEYOND_DOUBT, is_rounding
from kvgen.comparison.run import Run, run_forced, run_free, time_uncached
from kvgen.comparison.subjects import subject_of
from kvgen.comparison.thorough import not_tested as not_tested_thoroughly
from kvgen.comparison.thorough import thorough_uses
from kvgen.comparison.trial import Finding
from kvgen.comparison.uses import default_uses, not_tested
from kvgen.comparison.verdict import ACCEPTABLE, Verdict
from kvgen.contract import Backend
from kvgen.errors import UsageError, in_one_line

_DOUBTFUL = 3.0  # noise floors; from there to `BEYOND_DOUBT`, a wider dtype decides
_SHARP_STEPS = 12  # steps computed in a wider dtype, where each may take seconds


@dataclass(frozen=True)
class PatternResult:
    """Result of one pattern.

    verdict: on its logits. tokens_verdict: on the tokens that it generates.
    reason: why it was not compared, if it was not.
    exact: whether its logits equal uncached ones bit for bit. ratio: distance of its worst step, in noise floors.
    tokens: what it generates greedily. first_difference: index of the first token that differs from uncached decoding;
        None if none does.
    seconds: for all steps; estimated from a few steps for uncached decoding.
    probes: other uses of the cache, for the pattern `full-sequence`. findings: explanations of a difference.
    """

    pattern: Pattern
    verdict: Verdict
    reason: str = ""
    gap: Gap | None = None
    exact: bool = False
    ratio: float | None = None
    tokens: tuple[int, ...] | None = None
    tokens_verdict: Verdict | None = None
    first_difference: int | None = None
    computed: int | None = None
    seconds: float | None = None
    probes: tuple[Probe, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Results of all patterns on one text. The first row is uncached decoding, the reference.

        >>> comparison = kvgen.compare(loaded, "Once upon a time,", patterns=("full-sequence", "last-token"), steps=8)
        >>> [(row.pattern.name, str(row.verdict)) for row in comparison.rows]
        [('uncached', 'equivalent'), ('full-sequence', 'equivalent'), ('last-token', 'different')]

    ids: the text, prompt and completion. start: length of the prompt.
    floor: noise floor of the text; 0 if every pattern gives identical bits, since it is not measured then.
    reference_gap: largest |difference| between one uncached pass over the text and passes over its prefixes.
    not_tested: what was not tested, in words.
    """

    ids: tuple[int, ...]
    start: int
    floor: float
    reference_gap: float
    rows: tuple[PatternResult, ...]
    not_tested: str

    @property
    def steps(self) -> int:
        return len(self.ids) - self.start

    @property
    def acceptable(self) -> bool:
        """Whether every right pattern is right; patterns that are wrong on purpose do not count."""
        return all(row.verdict in ACCEPTABLE for row in self.rows if row.pattern.right)


def compare_ids(
    backend: Backend,
    prompt: Sequence[int],
    *,
    patterns: Sequence[str] = (FULL_SEQUENCE.name,),
    steps: int = 32,
    continuation: Sequence[int] | None = None,
    special_ids: frozenset[int] = frozenset(),
    thorough: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """`compare` on token ids, for a model that may lack a tokenizer.

    prompt: token ids. steps: number of tokens to decode after it; end-of-text tokens do not stop it.
    continuation: tokens to feed after the prompt; None for the greedy choice of uncached decoding.
    special_ids: special tokens to test the cache with. thorough: try more uses of the cache, which takes minutes.
    progress: called before each use, with its name, its number from 0 and the number of uses.

    Raises UsageError for an unknown pattern or a text that does not fit the context, ModelError if uncached logits are
    NaN.
    """
    chosen = [_pattern(name) for name in patterns]
    start, steps = backend.ids_tensor(prompt), _steps_that_fit(backend, prompt, steps)
    reference = Reference(subject_of(backend))
    greedy = _reference_text(reference, start, steps)
    case, cached = greedy.case, greedy.cached
    if continuation is not None:
        ids = torch.cat((start, backend.ids_tensor(tuple(continuation)[:steps])), dim=1)
        case, cached = make_case(reference, ids, len(prompt)), None
    case = replace(case, special_ids=special_ids)
    seconds, alone = time_uncached(case)
    reference_gap, findings = unreliable_reference(case, alone)
    rows = [_reference_row(case, greedy.tokens, seconds, findings)]
    floor = 0.0
    uses = (*default_uses(case), *(thorough_uses(case) if thorough else ()))
    for pattern in chosen:
        if findings:
            rows.append(PatternResult(pattern, Verdict.NOT_COMPARABLE, reason="the uncached reference is unreliable"))
            continue
        probed = partial(run_probes, uses=uses, progress=progress) if pattern is FULL_SEQUENCE else _no_probes
        row, judged = _compare_pattern(case, pattern, greedy, cached if pattern is FULL_SEQUENCE else None, probed)
        if pattern is FULL_SEQUENCE and greedy.failure and row.verdict in ACCEPTABLE:
            row = replace(row, verdict=Verdict.UNSUPPORTED, reason=f"fails at times: {greedy.failure}")
        rows.append(row)
        floor = max(floor, judged.floor if judged else 0.0)
    text = tuple(case.ids[0].tolist())
    return Comparison(
        text, len(prompt), floor, reference_gap, tuple(rows), (not_tested_thoroughly if thorough else not_tested)(case)
    )


@dataclass(frozen=True)
class _Greedy:
    """What uncached decoding generates. cached: the run of the right pattern on that text, if there was one.
    failure: why there was none, if it failed."""

    case: Case
    tokens: tuple[int, ...]
    cached: Run | None
    failure: str = ""


def _reference_text(reference: Reference, prompt: Tensor, steps: int) -> _Greedy:
    """Find what uncached greedy decoding generates.

    Decode with the cache, which is faster, and check with one uncached pass that uncached decoding chooses the same
    tokens. If not, or if the cache fails, decode without it.
    """
    subject, failure = reference.subject, ""
    if not subject.cannot_cache:
        try:
            run = run_free(FULL_SEQUENCE.call(subject), prompt, steps)
        except CALL_ERRORS as error:
            run, failure = None, in_one_line(error)
        if run is not None:
            case = _case_of(reference, prompt, run.tokens)
            if tuple(case.expected.argmax(-1).tolist()) == run.tokens:
                return _Greedy(case, run.tokens, run)
    run = run_free(UNCACHED.call(subject), prompt, steps)
    return _Greedy(_case_of(reference, prompt, run.tokens), run.tokens, None, failure)


def _case_of(reference: Reference, prompt: Tensor, tokens: tuple[int, ...]) -> Case:
    ids = torch.cat((prompt, prompt.new_tensor([tokens])), dim=1)
    return make_case(reference, ids, prompt.shape[1])


def _steps_that_fit(backend: Backend, prompt: Sequence[int], steps: int) -> int:
    if steps < 2 or not prompt:
        raise UsageError("compare needs a prompt and at least two steps: the first step has no cache to use")
    if backend.context_length is None:
        return steps
    if len(prompt) + 2 > backend.context_length:
        context = backend.context_length
        raise UsageError(f"a prompt of {len(prompt)} tokens and two steps exceed the context of {context}: shorten it")
    return min(steps, backend.context_length - len(prompt))


def _reference_row(case: Case, tokens: tuple[int, ...], seconds: float, findings: list[Finding]) -> PatternResult:
    return PatternResult(
        UNCACHED,
        Verdict.NOT_COMPARABLE if findings else Verdict.EQUIVALENT,
        gap=gap(case.expected, case.expected, case.targets),
        exact=True,
        ratio=0.0,
        tokens=tokens,
        tokens_verdict=Verdict.EQUIVALENT,
        computed=sum(case.lengths),
        seconds=seconds,
        findings=tuple(findings),
    )


def _pattern(name: str) -> Pattern:
    if name not in PATTERNS or name == UNCACHED.name:
        known = ", ".join(known for known in PATTERNS if known != UNCACHED.name)
        raise UsageError(f"unknown pattern {name!r}; known: {known}")
    return PATTERNS[name]


def _compare_pattern(
    case: Case, pattern: Pattern, greedy: _Greedy, run: Run | None, probed: Callable[[Case, bool], tuple[Probe, ...]]
) -> tuple[PatternResult, Judgement | None]:
    """Result of a pattern and the judgement on its logits.

    run: an earlier run of it on this text, if any. probed: tries other uses of the cache; see `run_probes`.
    """
    subject = case.subject
    if subject.cannot_cache:
        return PatternResult(pattern, Verdict.UNSUPPORTED, reason=subject.cannot_cache), None
    try:
        run = run or run_forced(pattern.call(subject), case.ids, case.start)
    except CALL_ERRORS as error:
        return PatternResult(pattern, Verdict.UNSUPPORTED, reason=in_one_line(error)), None
    judged = case.judge(run.logits)
    wrong = _is_wrong(case, pattern, judged)
    probes = probed(replace(case, cache=run.cache), not wrong)
    right = not wrong and not any(probe.wrong for probe in probes)
    verdict = Verdict.EQUIVALENT if right else Verdict.LOSSY if subject.lossy else Verdict.DIFFERENT
    tokens, first_difference, tokens_verdict = _tokens_of(case, pattern, greedy, run)
    row = PatternResult(
        pattern,
        verdict,
        reason=subject.lossy or "" if verdict is Verdict.LOSSY else "",
        gap=gap(case.expected, run.logits, case.targets),
        exact=judged.exact,
        ratio=judged.ratio,
        tokens=tokens,
        tokens_verdict=tokens_verdict,
        first_difference=first_difference,
        computed=run.computed,
        seconds=run.seconds,
        probes=probes,
        findings=tuple(diagnose(case, pattern, run.logits, judged, probes, wrong=wrong)),
    )
    return row, judged


def _no_probes(case: Case, right: bool) -> tuple[Probe, ...]:
    return ()


def _is_wrong(case: Case, pattern: Pattern, judged: Judgement) -> bool:
    """Whether logits are further from uncached ones than rounding explains.

    16 bits hide faults, so a 16-bit model is run in float32 as well. Results that rounding may reach are decided in a
    wider dtype, where it all but vanishes and a fault does not.
    """
    if judged.exact or judged.ratio > BEYOND_DOUBT:
        return not judged.exact
    doubtful = judged.ratio > _DOUBTFUL or case.sharp is not case
    if not doubtful or case.wider is None:
        return judged.wrong
    steps = max(_SHARP_STEPS, judged.length - case.start + 1)
    try:
        run = run_forced(pattern.call(case.wider.subject), case.ids[:, : case.start + steps], case.start)
    except CALL_ERRORS:
        return judged.wrong
    sharper = case.wider.judge(run.logits)
    dtypes = case.subject.dtype, case.wider.subject.dtype
    if (judged.wrong or case.sharp is case) and is_rounding(judged.ratio, sharper.ratio, *dtypes):
        return False
    return _is_wrong(case.wider, pattern, sharper)


def _tokens_of(
    case: Case, pattern: Pattern, greedy: _Greedy, run: Run
) -> tuple[tuple[int, ...] | None, int | None, Verdict | None]:
    """What a pattern generates, the first token that differs, and the verdict on it."""
    if case is greedy.case or torch.equal(case.ids, greedy.case.ids):
        chosen = tuple(run.logits.argmax(-1).tolist())
        if chosen == greedy.tokens:
            return chosen, None, Verdict.EQUIVALENT
    try:
        free = run_free(pattern.call(case.subject), case.ids[:, : case.start], len(greedy.tokens))
    except CALL_ERRORS:  # NaN logits, for example
        return None, None, None
    pairs = zip(greedy.tokens, free.tokens, strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return free.tokens, None, Verdict.EQUIVALENT
    # Both have read the same text up to here: if their logits differ only by rounding, this is a near-tie.
    step = greedy.case.reference.judge(
        free.logits[: first + 1], greedy.case.expected[: first + 1], greedy.case.ids, greedy.case.lengths[: first + 1]
    )
    return free.tokens, first, Verdict.DIFFERENT if step.wrong else Verdict.NEAR_TIE
