"""Numbers that say how far two series of logits are apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """How far a candidate's logits are from the reference's, over the steps of one text.

    per_step: the largest |difference| of a logit at each step.
    kl: KL(reference || candidate) in nats, mean over steps. top1: share of steps with the same most likely token.
    nll_change: candidate's mean negative log-likelihood of the text, minus the reference's, in nats.
    """

    per_step: tuple[float, ...]
    max_abs: float
    mean_abs: float
    kl: float
    max_kl: float
    top1: float
    nll_change: float


def gap(reference: Tensor, candidate: Tensor, targets: Tensor) -> Gap:
    """Compare logits of shape (steps, vocab). targets: the tokens that the text goes on with, (steps,) int64."""
    difference = (candidate.double() - reference.double()).abs()
    expected, actual = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    kl = (expected.exp() * (expected - actual)).sum(-1).clamp(min=0)
    at = targets[:, None]
    per_step = difference.amax(-1)
    return Gap(
        per_step=tuple(per_step.tolist()),
        max_abs=float(per_step.max()),
        mean_abs=float(difference.mean()),
        kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float((reference.argmax(-1) == candidate.argmax(-1)).double().mean()),
        nll_change=float((expected.gather(-1, at) - actual.gather(-1, at)).mean()),
    )
