"""How far apart two series of logits are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """Difference between candidate and reference logits, over the steps of one text.

    per_step: largest |difference| of a logit at each step; infinite where one is NaN or infinite.
    kl: KL(reference || candidate) in nats, mean over steps. top1: share of steps with the same most likely token.
    nll_change: mean negative log-likelihood of the text, candidate minus reference, in nats.
    """

    per_step: tuple[float, ...]
    max_abs: float
    mean_abs: float
    kl: float
    max_kl: float
    top1: float
    nll_change: float


def gap(reference: Tensor, candidate: Tensor, targets: Tensor) -> Gap:
    """Compare logits, (steps, vocab) each. targets: the next token of the text at each step, (steps,) int64."""
    steps = [_step_gap(*step) for step in zip(reference, candidate, targets.tolist(), strict=True)]
    largest, mean, kl, top1, nll = zip(*steps, strict=True)
    return Gap(
        per_step=largest,
        max_abs=max(largest),
        mean_abs=sum(mean) / len(steps),
        kl=sum(kl) / len(steps),
        max_kl=max(kl),
        top1=sum(top1) / len(steps),
        nll_change=sum(nll) / len(steps),
    )


def _step_gap(reference: Tensor, candidate: Tensor, target: int) -> tuple[float, float, float, bool, float]:
    """Largest and mean |difference|, KL, same top token, and NLL change for logits of one step, (vocab,)."""
    if torch.equal(reference, candidate):
        return 0.0, 0.0, 0.0, True, 0.0
    difference = torch.where(reference == candidate, 0.0, candidate.double() - reference.double()).abs()
    if difference.isnan().any():
        return math.inf, math.inf, math.inf, False, math.inf
    expected, actual = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    kl = torch.where(expected == -math.inf, 0.0, expected.exp() * (expected - actual)).sum().clamp(min=0)
    same_best = bool(reference.argmax() == candidate.argmax())
    change = 0.0 if expected[target] == actual[target] else float(expected[target] - actual[target])
    return float(difference.max()), float(difference.mean()), float(kl), same_best, change
