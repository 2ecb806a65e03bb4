"""The comparison: every pattern on the same text, its verdict, and for each that differs the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvgen.compare.case import CALL_ERRORS, Case
from kvgen.compare.diagnosis import diagnose, unreliable_reference
from kvgen.compare.experiments import Finding
from kvgen.compare.metrics import Gap, gap
from kvgen.compare.noise import Noise, measure_noise
from kvgen.compare.patterns import FULL_SEQUENCE, PATTERNS, UNCACHED, Pattern
from kvgen.compare.probes import Probe, run_probes
from kvgen.compare.run import Forced, Free, run_forced, run_free
from kvgen.compare.verdict import ACCEPTABLE, Verdict
from kvgen.contract import Backend
from kvgen.errors import UsageError, in_one_line
from kvgen.generation.decode import ids_tensor
from kvgen.rounding import LIMIT


@dataclass(frozen=True)
class Row:
    """One pattern's result.

    verdict: on its logits. tokens_verdict: on the tokens that it chooses by itself.
    reason: why there are no numbers, where there are none.
    ratio: how many noise floors its worst step is away from the exact logits.
    first_difference: index of the first token that the pattern alone chooses otherwise; None if none.
    probes: other ways to use the cache, for a right pattern. findings: what explains a difference.
    """

    pattern: Pattern
    verdict: Verdict
    reason: str = ""
    gap: Gap | None = None
    ratio: float | None = None
    free: Free | None = None
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
    oracle_gap: the largest |difference| between step-by-step uncached logits and one parallel pass; None if the
        model gives no logits for all positions.
    """

    ids: tuple[int, ...]
    start: int
    noise: Noise
    oracle_gap: float | None
    rows: tuple[Row, ...]

    @property
    def steps(self) -> int:
        return len(self.ids) - self.start

    @property
    def acceptable(self) -> bool:
        """Whether the right pattern is right; wrong ones do not count."""
        return all(row.verdict in ACCEPTABLE for row in self.rows if row.pattern.right)


def compare(
    backend: Backend,
    prompt: Sequence[int],
    *,
    patterns: Sequence[str] = (FULL_SEQUENCE.name,),
    steps: int = 32,
    continuation: Sequence[int] | None = None,
    eos_ids: frozenset[int] = frozenset(),
) -> Comparison:
    """Compare patterns with uncached decoding.

    prompt: the ids that are handed over at once. steps: how many tokens to go on for.
    continuation: the text to force every pattern along, after the prompt; None for what uncached decoding
        chooses.

    Raises UsageError for an unknown pattern or a text that does not fit the context.
    """
    chosen = [_pattern(name) for name in patterns]
    start, steps = ids_tensor(backend, prompt), _steps_that_fit(backend, prompt, steps)
    free = run_free(UNCACHED.call(backend), start, steps, eos_ids)
    text = free.tokens if continuation is None else tuple(continuation)[:steps]
    ids = torch.cat((start, ids_tensor(backend, text)), dim=1)
    forced = run_forced(UNCACHED.call(backend), ids, len(prompt), use_cache=False)
    twin = backend.in_float64()
    noise = measure_noise(backend, twin, ids, len(prompt), forced.logits)
    case = Case(backend, twin, ids, len(prompt), forced.logits, noise)
    oracle_gap, findings = unreliable_reference(case)
    rows = [_reference_row(case, forced, free, findings)]
    for pattern in chosen:
        rows.append(
            Row(pattern, Verdict.NOT_COMPARABLE, reason="the uncached reference cannot be relied on")
            if findings
            else _compare_pattern(case, pattern, free, eos_ids)
        )
    return Comparison(tuple(ids[0].tolist()), len(prompt), noise, oracle_gap, tuple(rows))


def _steps_that_fit(backend: Backend, prompt: Sequence[int], steps: int) -> int:
    if steps < 1 or not prompt:
        raise UsageError("compare needs a prompt and at least one step")
    if backend.context_length is None:
        return steps
    if len(prompt) >= backend.context_length:
        raise UsageError(f"the prompt has {len(prompt)} tokens; the model's context is {backend.context_length}")
    return min(steps, backend.context_length - len(prompt))


def _reference_row(case: Case, forced: Forced, free: Free, findings: list[Finding]) -> Row:
    return Row(
        UNCACHED,
        Verdict.NOT_COMPARABLE if findings else Verdict.EQUIVALENT,
        gap=gap(forced.logits, forced.logits, case.targets),
        ratio=case.noise.ratio(forced.logits),
        free=free,
        tokens_verdict=Verdict.EQUIVALENT,
        computed=forced.computed,
        seconds=forced.seconds,
        findings=tuple(findings),
    )


def _pattern(name: str) -> Pattern:
    if name not in PATTERNS or name == UNCACHED.name:
        known = ", ".join(known for known in PATTERNS if known != UNCACHED.name)
        raise UsageError(f"pattern {name!r} is not known; there are: {known}")
    return PATTERNS[name]


def _compare_pattern(case: Case, pattern: Pattern, reference: Free, eos_ids: frozenset[int]) -> Row:
    backend = case.backend
    if backend.cannot_cache:
        return Row(pattern, Verdict.UNSUPPORTED, reason=backend.cannot_cache)
    try:
        forced = run_forced(pattern.call(backend), case.ids, case.start)
        free = run_free(pattern.call(backend), case.ids[:, : case.start], len(reference.tokens), eos_ids)
    except CALL_ERRORS as error:
        return Row(pattern, Verdict.UNSUPPORTED, reason=in_one_line(error))
    ratio = case.noise.ratio(forced.logits)
    # In bf16 noise can hide a fault that is there; in float64 what is not rounding stays.
    sharp = forced.logits if case.twin is None else run_forced(pattern.call(case.twin), case.ids, case.start).logits
    wrong = ratio > LIMIT or case.sharp.noise.ratio(sharp) > LIMIT
    probes = run_probes(case) if pattern is FULL_SEQUENCE else ()
    right = not wrong and not any(probe.wrong for probe in probes)
    verdict = Verdict.EQUIVALENT if right else Verdict.LOSSY if backend.lossy else Verdict.DIFFERENT
    first_difference, tokens_verdict = _compare_tokens(reference, free, case.noise, may_tie=right)
    return Row(
        pattern,
        verdict,
        reason=backend.lossy or "" if verdict is Verdict.LOSSY else "",
        gap=gap(case.reference, forced.logits, case.targets),
        ratio=ratio,
        free=free,
        tokens_verdict=tokens_verdict,
        first_difference=first_difference,
        computed=forced.computed,
        seconds=forced.seconds,
        probes=probes,
        findings=tuple(diagnose(case, pattern, sharp, probes, wrong=wrong)),
    )


def _compare_tokens(reference: Free, free: Free, noise: Noise, *, may_tie: bool) -> tuple[int | None, Verdict]:
    """Where the tokens part, and whether that is a near-tie; it can be one only if the logits are equivalent."""
    pairs = zip(reference.tokens, free.tokens, strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return None, Verdict.EQUIVALENT
    # Both logits of a tie may be off by the worst rounding error, in opposite directions, in both computations.
    is_tie = may_tie and reference.margins[first] <= 4 * noise.worst
    return first, Verdict.NEAR_TIE if is_tie else Verdict.DIFFERENT
