"""Feed a text token by token, to tell a prompt that is cached wrongly from a limit on length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvgen.comparison.case import random_text
from kvgen.comparison.trial import Finding, Trial

MAX_LENGTH = 128  # of a text whose prefixes or suffixes are all tried
_BEYOND = (3, 8)  # fewest and most lengths looked at after the first wrong one
_FIRST = 6  # a first wrong length below depends on the prompts tried


def token_by_token(trial: Trial) -> Finding | None:
    """Without a prompt of several tokens: is the pattern right then, or right until texts have a certain length?"""
    if trial.length > MAX_LENGTH:
        return None
    text = _longer(trial, trial.case.ids.shape[1])
    wrong = _wrong_lengths(trial, text, 1)
    if not wrong:
        return Finding(
            "prompt cached wrongly",
            "A prompt of several tokens leaves wrong or incomplete entries in the cache.",
            "fed token by token from the start, the pattern is right",
        )
    if len(wrong) <= _BEYOND[0] or wrong[0] < _FIRST or wrong != list(range(wrong[0], wrong[-1] + 1)):
        return None
    others = _longer(trial, 2 * text.shape[1])[:, text.shape[1] :]  # tokens of no text so far
    if len(others[0]) < wrong[-1] or any(
        _wrong_lengths(trial, ids, begin) != wrong for ids, begin in ((text, 3), (others, 1))
    ):
        return None
    return Finding(
        "beyond a length",
        f"Texts are right up to {wrong[0] - 1} positions and wrong beyond.",
        f"fed token by token, two texts are right before and wrong at all of {wrong[0]} to {wrong[-1]} positions",
    )


def _longer(trial: Trial, length: int) -> Tensor:
    """The text of a trial, with random tokens after it, (1, length + some), within the context."""
    context = trial.case.subject.context_length
    wanted = length + _BEYOND[1]
    return random_text(trial.case, wanted if context is None else min(wanted, context))


def _wrong_lengths(trial: Trial, text: Tensor, begin: int) -> list[int]:
    """Wrong lengths of a text that is fed token by token after `begin` tokens: up to some after the first."""
    cache: Any = None
    wrong: list[int] = []
    for length in range(begin, text.shape[1] + 1):
        if wrong and length > wrong[0] + _BEYOND[1]:
            break
        logits, cache = trial.call(text[:, :length], cache)
        if not trial.case.close(logits[0, -1], trial.case.last_logits(text[:, :length]), text[:, :length]):
            wrong.append(length)
    return wrong
