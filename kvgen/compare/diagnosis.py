"""Why a pattern differs: what the experiments leave standing, with its evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgen.compare.case import Case
from kvgen.compare.experiments import EXPERIMENTS, LAST_RESORTS, Finding, Trial, attempt, nondeterministic
from kvgen.compare.patterns import Pattern
from kvgen.compare.probes import Probe
from kvgen.rounding import LIMIT, eps, rms, typical_floor


def unreliable_reference(case: Case) -> tuple[float | None, list[Finding]]:
    """What forbids to compare: a reference that is not deterministic, or not causal.

    Also returns the largest |difference| between uncached decoding step by step and one parallel pass over the
    text, an independent oracle; None if the model gives no logits for all positions.
    """
    findings = []
    first, second = (case.backend(case.ids[:, : case.start], None)[0][0, -1] for _ in range(2))
    # Not held against the measured noise: where chance is at work, that is large.
    if float(rms(first - second)) > LIMIT * typical_floor(first, case.backend.dtype):
        findings.append(nondeterministic(case.backend, float((first - second).abs().max())))
    parallel = case.backend.all_logits(case.ids)
    if parallel is None:
        return None, findings
    rows = parallel[0, case.start - 1 : -1].cpu()
    oracle_gap = float((rows.double() - case.reference.double()).abs().max())
    exact = case.twin or case.backend
    oracle = exact.all_logits(case.ids)
    lengths = range(case.start, case.ids.shape[1], max(1, (case.ids.shape[1] - case.start) // 4))
    if oracle is not None and not findings:
        gaps = [float(rms(oracle[0, n - 1].cpu() - case.alone(case.ids[:, :n]))) for n in lengths]
        size = float(rms(case.reference).max())
        # A library may do a part in float32 even in the float64 twin; what leaks from the future is far larger.
        if max(gaps) > 64 * max(eps(exact.dtype), eps(torch.float32)) * size:
            findings.append(
                Finding(
                    "not causal",
                    "The model is not causal: what comes after a position changes its logits. No cache can be right.",
                    f"one pass over the text and a pass over its beginning differ by {max(gaps):.2g} (RMS) at the "
                    "same position",
                )
            )
    return oracle_gap, findings


def diagnose(case: Case, pattern: Pattern, logits: Tensor, probes: tuple[Probe, ...], *, wrong: bool) -> list[Finding]:
    """The explanations that survive for a pattern on a case.

    logits: what the pattern returns on the sharp case, (steps, vocab). wrong: the verdict on its step-by-step
        logits.

    Empty for a right pattern that is right; otherwise at least one, if only that nothing explains it.
    """
    if not wrong:
        found = [] if pattern.right else [_harmless(case, pattern)]
        return found + [_from_probe(probe) for probe in probes if probe.wrong]
    sharp = case.sharp
    distances = rms(logits - sharp.noise.exact) / sharp.noise.floor
    wrong_steps = (distances > LIMIT).nonzero()[:, 0].tolist()
    if not wrong_steps:
        return [_rounding(case, float(distances.max()))]
    trial = Trial(sharp, pattern, pattern.call(sharp.backend), sharp.start + wrong_steps[0], logits[wrong_steps[0]])
    found = [finding for experiment in EXPERIMENTS if (finding := attempt(experiment, trial))]
    lost = [finding for finding in found if finding.name == "context lost"]
    if lost:  # then order and distance do not matter either, which says nothing more
        return lost
    for last_resort in LAST_RESORTS:
        if not found and (finding := attempt(last_resort, trial)):
            found = [finding]
    return found or [Finding("unexplained", "None of the known explanations fits.", "no experiment favours one")]


def _rounding(case: Case, distance: float) -> Finding:
    evidence = "in float64 the difference vanishes" if case.twin else f"it is {distance:.0f} times the noise"
    return Finding(
        "rounding",
        "Rounding only: the pattern is right, but loses more precision than uncached decoding does.",
        evidence,
    )


def _from_probe(probe: Probe) -> Finding:
    name, text = {
        "several new tokens at once": (
            "multi-token calls",
            "Calls with several new tokens are wrong; one token at a time is not.",
        ),
        "rows of a batch": ("rows mixed", "The rows of a batch are mixed up: a row is not as if it were alone."),
        "an edited text": (
            "edits not noticed",
            "The cache does not notice that the text was edited: it keeps what belongs to the old one.",
        ),
    }[probe.name]
    return Finding(name, text, f"{probe.name}: {probe.ratio or 0:.0f} times the noise")


def _harmless(case: Case, pattern: Pattern) -> Finding:
    """Why a wrong pattern does no harm on this model."""
    return Finding("harmless here", pattern.harmless, "its logits are no further from the exact ones than rounding")
