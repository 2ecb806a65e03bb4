"""What the shape of a difference, over the vocabulary and from step to step, tells of its cause."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgen.comparison.case import Case, random_text
from kvgen.comparison.reference import Judgement
from kvgen.comparison.rounding import LIMIT, rms
from kvgen.comparison.run import run_forced
from kvgen.comparison.trial import Finding, Trial

_FEW = 4  # logits of a step that may be changed one by one
_VOCABULARY = 4 * _FEW  # smallest that tells a few logits from all
_TEXTS, _STEPS = 8, 9  # random ones: in a text that repeats itself, so does rounding
_FITTED, _REPEATED, _PEAKED = 0.4, 0.2, 0.8  # parts of the squared difference that rounding stays below
_WIDTH = 1 << 13  # logits of a step that are looked at
_PEAK = 10  # one in so many logits


def few_logits(case: Case, logits: Tensor, judged: Judgement) -> Finding | None:
    """Whether each wrong step, of (steps, vocab), differs in a few logits only."""
    gaps = _gaps(logits, case.expected[: len(logits)])
    wrong = gaps[[apart > LIMIT * judged.floor for apart in judged.distances]]
    if wrong.shape[1] < _VOCABULARY:
        return None
    ordered = wrong.abs().sort(-1).values
    for count in range(1, _FEW + 1):
        if float(rms(ordered[:, :-count]).max()) <= LIMIT * judged.floor:
            logits_differ = "1 logit differs" if count == 1 else f"{count} logits differ"
            return Finding(
                "few logits",
                f"Only {logits_differ} at a step: the output of cached calls is changed, not what attention reads.",
                f"the others of {wrong.shape[1]} are right at all {len(wrong)} wrong steps",
            )
    return None


def is_like_rounding(trial: Trial) -> bool:
    """Whether cached steps of random texts differ as rounding does: all over the vocabulary, differently in each text,
    and neither by a constant, nor in proportion to the logits or to what the context contributes to them."""
    found = [_random_steps(trial, number) for number in range(_TEXTS)]
    gaps, expected, alone = (torch.cat(parts) for parts in zip(*found, strict=True))
    predictors = torch.stack((torch.ones_like(expected), expected, expected - alone), dim=-1)  # (steps, vocab, 3)
    fit = predictors @ torch.linalg.lstsq(predictors, gaps[..., None]).solution
    squared = float(gaps.square().sum())
    fitted = float(fit.square().sum()) / squared
    repeated = float(gaps.mean(0).square().sum()) * len(gaps) / squared
    peaked = float(gaps.square().sort(-1).values[:, -(gaps.shape[1] // _PEAK) :].sum()) / squared
    return fitted < _FITTED and repeated < _REPEATED and peaked < _PEAKED


def _random_steps(trial: Trial, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of cached steps of a random text, their logits, and those of the newest token alone, (steps, some of
    the vocabulary) each."""
    case, start, context = trial.case, trial.case.start, trial.case.subject.context_length
    present, count = case.ids.shape[1], start + _STEPS
    text = random_text(case, present + (number + 1) * count)[:, present + number * count :][:, :context]
    lengths = range(start + 1, text.shape[1])
    expected = case.reference.step_logits(text, lengths).double()
    gaps = _gaps(run_forced(trial.call, text, start).logits[1:], expected)
    alone = torch.stack([case.last_logits(text[:, n - 1 : n]) for n in lengths]).double()
    some = slice(None, None, -(-gaps.shape[1] // _WIDTH))
    return gaps[:, some], expected[:, some], alone[:, some]


def _gaps(logits: Tensor, expected: Tensor) -> Tensor:
    """Differences, in float64; 0 where both are the same infinity."""
    return torch.where(logits == expected, 0.0, logits.double() - expected.double())
