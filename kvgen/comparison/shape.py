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
_STEPS = 16  # of a random text: in a text that repeats itself, so does rounding
_FITTED, _REPEATED, _PEAKED = 0.4, 0.7, 0.8  # parts of the squared difference that rounding stays below
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
    """Whether cached steps of a random text differ as rounding does: all over the vocabulary, differently at each step,
    and neither by a constant, nor in proportion to the logits or to what the context contributes to them."""
    case, start = trial.case, trial.case.start
    present, context = case.ids.shape[1], case.subject.context_length
    count = start + _STEPS
    text = random_text(case, present + count)[:, present:]
    text = text if context is None else text[:, :context]
    expected = case.reference.step_logits(text, range(start, text.shape[1]))[1:].double()
    gaps = _gaps(run_forced(trial.call, text, start).logits[1:], expected)
    alone = torch.stack([case.last_logits(text[:, n - 1 : n]) for n in range(start + 1, text.shape[1])]).double()
    predictors = torch.stack((torch.ones_like(expected), expected, expected - alone), dim=-1)  # (steps, vocab, 3)
    found = torch.linalg.lstsq(predictors, gaps[..., None]).solution
    squared = gaps.square().sum()
    fitted = float((predictors @ found).square().sum() / squared)
    repeated = float(gaps.mean(0).square().sum() * len(gaps) / squared)
    peaked = float(gaps.square().sort(-1).values[:, -(gaps.shape[1] // _PEAK) :].sum() / squared)
    return fitted < _FITTED and repeated < _REPEATED and peaked < _PEAKED


def _gaps(logits: Tensor, expected: Tensor) -> Tensor:
    """Differences, in float64; 0 where both are the same infinity."""
    return torch.where(logits == expected, 0.0, logits.double() - expected.double())
