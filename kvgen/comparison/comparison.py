"""The comparison: every pattern on the same text, its verdict, and for each that differs the reason."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvgen.comparison.case import CALL_ERRORS, Case, make_case
from kvgen.comparison.diagnosis import diagnose, unreliable_reference
from kvgen.comparison.experiments import Finding
from kvgen.comparison.metrics import Gap, gap
from kvgen.comparison.patterns import FULL_SEQUENCE, PATTERNS, UNCACHED, Pattern
from kvgen.comparison.probes import Probe, run_probes, unseen
from kvgen.comparison.reference import Judgement, Reference
from kvgen.comparison.run import Run, run_forced, run_free
from kvgen.comparison.subjects import subject_of
from kvgen.comparison.verdict import ACCEPTABLE, Verdict
from kvgen.contract import Backend
from kvgen.errors import UsageError, in_one_line

_DOUBTFUL = 3.0  # noise floors from which on a wider dtype has to decide, up to
_BEYOND_DOUBT = 100.0
_SHARP_STEPS = 12  # that are computed in a wider dtype, where each may take seconds
_TIMED = 3  # uncached steps that are timed


@dataclass(frozen=True)
class PatternResult:
    """One pattern's result.

    verdict: on its logits. tokens_verdict: on the tokens that it chooses by itself.
    reason: why there are no numbers, where there are none.
    exact: whether its logits are the uncached ones bit for bit. ratio: how many noise floors its worst step is away.
    tokens: what it goes on with by itself. first_difference: index of the first token that it alone chooses otherwise;
        None if none.
    seconds: for all steps; of the reference, from a few of them.
    probes: other ways to use the cache, for the right pattern. findings: what explains a difference.
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
    """All patterns on one text. The first row is the reference.

    ids: the text, prompt and steps. start: how many of them are the prompt.
    floor: the noise floor of that text; 0 if every pattern gives the same bits, since then it was not measured.
    reference_gap: the largest |difference| between one uncached pass over the text and passes over its beginnings.
    unseen: what was not looked at, for people.
    """

    ids: tuple[int, ...]
    start: int
    floor: float
    reference_gap: float
    rows: tuple[PatternResult, ...]
    unseen: str

    @property
    def steps(self) -> int:
        return len(self.ids) - self.start

    @property
    def acceptable(self) -> bool:
        """Whether the right pattern is right; wrong ones do not count."""
        return all(row.verdict in ACCEPTABLE for row in self.rows if row.pattern.right)


def compare_ids(
    backend: Backend,
    prompt: Sequence[int],
    *,
    patterns: Sequence[str] = (FULL_SEQUENCE.name,),
    steps: int = 32,
    continuation: Sequence[int] | None = None,
    special_ids: frozenset[int] = frozenset(),
) -> Comparison:
    """`compare` of token ids, with a model that need not have a tokenizer.

    prompt: the ids that are handed over at once. steps: how many tokens to go on for.
    continuation: the text to force every pattern along, after the prompt; None for what uncached decoding
        chooses. Texts go on behind tokens that end them.
    special_ids: of tokens that ordinary text does not contain; the cache is tried on them too.

    Raises UsageError for an unknown pattern or a text that does not fit the context, ModelError for uncached logits
    that are not numbers.
    """
    chosen = [_pattern(name) for name in patterns]
    start, steps = backend.ids_tensor(prompt), _steps_that_fit(backend, prompt, steps)
    reference = Reference(subject_of(backend))
    own = _reference_text(reference, start, steps)
    case, cached = own.case, own.cached
    if continuation is not None:
        ids = torch.cat((start, backend.ids_tensor(tuple(continuation)[:steps])), dim=1)
        case, cached = make_case(reference, ids, len(prompt)), None
    case = replace(case, special_ids=special_ids)
    seconds, alone = _timed(case)
    reference_gap, findings = unreliable_reference(case, alone)
    rows = [_reference_row(case, own.tokens, seconds, findings)]
    floor = 0.0
    for pattern in chosen:
        if findings:
            rows.append(
                PatternResult(pattern, Verdict.NOT_COMPARABLE, reason="the uncached reference cannot be relied on")
            )
            continue
        row, judged = _compare_pattern(case, pattern, own, cached if pattern is FULL_SEQUENCE else None)
        rows.append(row)
        floor = max(floor, judged.floor if judged else 0.0)
    text = tuple(case.ids[0].tolist())
    return Comparison(text, len(prompt), floor, reference_gap, tuple(rows), unseen(case))


@dataclass(frozen=True)
class _Own:
    """What uncached decoding chooses by itself. cached: the right pattern on that text, if it was run already."""

    case: Case
    tokens: tuple[int, ...]
    cached: Run | None


def _reference_text(reference: Reference, prompt: Tensor, steps: int) -> _Own:
    """Decode greedily without a cache.

    With the cache it is faster, and then one uncached pass over the text shows whether uncached decoding chooses the
    same. Where it does not, or where the cache fails, every step is computed.
    """
    subject = reference.subject
    if not subject.cannot_cache:
        try:
            run = run_free(FULL_SEQUENCE.call(subject), prompt, steps)
        except CALL_ERRORS:
            run = None
        if run is not None:
            case = _case_of(reference, prompt, run.tokens)
            if tuple(case.expected.argmax(-1).tolist()) == run.tokens:
                return _Own(case, run.tokens, run)
    run = run_free(UNCACHED.call(subject), prompt, steps)
    return _Own(_case_of(reference, prompt, run.tokens), run.tokens, None)


def _case_of(reference: Reference, prompt: Tensor, tokens: tuple[int, ...]) -> Case:
    ids = torch.cat((prompt, prompt.new_tensor([tokens])), dim=1)
    return make_case(reference, ids, prompt.shape[1])


def _timed(case: Case) -> tuple[float, dict[int, Tensor]]:
    """Seconds of uncached decoding, estimated from a few of its steps, and the logits of these by their length."""
    lengths = sorted({case.start, (case.start + case.ids.shape[1] - 1) // 2, case.ids.shape[1] - 1})[:_TIMED]
    case.alone(case.ids[:, : lengths[0]])  # what is set up once is not counted
    logits, began = {}, time.perf_counter()
    for length in lengths:
        logits[length] = case.subject(case.ids[:, :length], None)[0][0, -1].cpu()
    return (time.perf_counter() - began) / len(lengths) * len(case.lengths), logits


def _steps_that_fit(backend: Backend, prompt: Sequence[int], steps: int) -> int:
    if steps < 2 or not prompt:
        raise UsageError("compare needs a prompt and at least two steps: the first has no cache to use")
    if backend.context_length is None:
        return steps
    if len(prompt) + 2 > backend.context_length:
        raise UsageError(f"the prompt has {len(prompt)} tokens; the model's context is {backend.context_length}")
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
        raise UsageError(f"pattern {name!r} is not known; there are: {known}")
    return PATTERNS[name]


def _compare_pattern(
    case: Case, pattern: Pattern, own: _Own, run: Run | None
) -> tuple[PatternResult, Judgement | None]:
    """The result of a pattern, and how far its logits are. run: the pattern on the text, if it was run already."""
    subject = case.subject
    if subject.cannot_cache:
        return PatternResult(pattern, Verdict.UNSUPPORTED, reason=subject.cannot_cache), None
    try:
        run = run or run_forced(pattern.call(subject), case.ids, case.start)
    except CALL_ERRORS as error:
        return PatternResult(pattern, Verdict.UNSUPPORTED, reason=in_one_line(error)), None
    judged = case.judge(run.logits)
    wrong = _is_wrong(case, pattern, judged)
    probes = run_probes(case) if pattern is FULL_SEQUENCE else ()
    right = not wrong and not any(probe.wrong for probe in probes)
    verdict = Verdict.EQUIVALENT if right else Verdict.LOSSY if subject.lossy else Verdict.DIFFERENT
    tokens, first_difference, tokens_verdict = _tokens_of(case, pattern, own, run)
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


def _is_wrong(case: Case, pattern: Pattern, judged: Judgement) -> bool:
    """Whether logits are further from the uncached ones than rounding.

    16 bits hide faults, so there the pattern is run in 32 as well; and what is near the limit is decided in a wider
    dtype, where rounding is all but gone and a fault is not.
    """
    if judged.exact or judged.ratio > _BEYOND_DOUBT:
        return not judged.exact
    doubtful = judged.ratio > _DOUBTFUL or case.sharp is not case
    if not doubtful or case.wider is None:
        return judged.wrong
    steps = max(_SHARP_STEPS, judged.length - case.start + 1)
    try:
        run = run_forced(pattern.call(case.wider.subject), case.ids[:, : case.start + steps], case.start)
    except CALL_ERRORS:
        return judged.wrong
    return case.wider.judge(run.logits).wrong


def _tokens_of(
    case: Case, pattern: Pattern, own: _Own, run: Run
) -> tuple[tuple[int, ...] | None, int | None, Verdict | None]:
    """What a pattern goes on with by itself, where that parts from the reference, and whether that is a near-tie."""
    if case is own.case or torch.equal(case.ids, own.case.ids):
        chosen = tuple(run.logits.argmax(-1).tolist())
        if chosen == own.tokens:
            return chosen, None, Verdict.EQUIVALENT
    try:
        free = run_free(pattern.call(case.subject), case.ids[:, : case.start], len(own.tokens))
    except CALL_ERRORS:  # logits that are not numbers, for example
        return None, None, None
    pairs = zip(own.tokens, free.tokens, strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return free.tokens, None, Verdict.EQUIVALENT
    # Up to here both have read the same text. Where their logits after it differ by rounding alone, it is a tie.
    step = own.case.reference.judge(
        free.logits[: first + 1], own.case.expected[: first + 1], own.case.ids, own.case.lengths[: first + 1]
    )
    return free.tokens, first, Verdict.DIFFERENT if step.wrong else Verdict.NEAR_TIE
