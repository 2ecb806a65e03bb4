"""The experiments: calls on texts that were chosen so that one explanation predicts what the others do not.

Each takes a trial and returns a finding if its explanation survives. None looks inside a model or a cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kvgen.comparison.case import CALL_ERRORS, Case
from kvgen.comparison.patterns import Pattern
from kvgen.comparison.rounding import distance, size
from kvgen.comparison.subjects import Subject
from kvgen.contract import Model

_OFFSETS = (-2, -1, 1, 2)
_MOST_FOREIGN = 8
_MOST_INFLUENCES = 24
_MOST_LENGTHS = 128  # of a text whose beginnings or ends are all tried
_VANISHED, _STAYED = 1 / 50, 1 / 4  # of a difference


@dataclass(frozen=True)
class Finding:
    """An explanation that survived its experiment. name: short, for programs. text: for people. evidence: why."""

    name: str
    text: str
    evidence: str


@dataclass(frozen=True)
class Trial:
    """A pattern at the first step where it is wrong: after `length` positions it returned `wrong`, (vocab,)."""

    case: Case
    pattern: Pattern
    call: Model
    length: int
    wrong: Tensor

    def is_like(self, logits: Tensor, ids: Tensor) -> bool:
        """Whether the pattern returned what is expected of a text, (1, n), but for rounding."""
        return self.case.same(self.wrong, logits, ids)

    def run(self, ids: Tensor) -> Tensor:
        """What the pattern returns after `ids`, (1, length), handed over as the text was: (vocab,)."""
        cache: Any = None
        for length in range(min(self.case.start, ids.shape[1]), ids.shape[1] + 1):
            logits, cache = self.call(ids[:, :length], cache)
        return logits[0, -1].cpu()

    @property
    def ids(self) -> Tensor:
        return self.case.ids[:, : self.length]

    @cached_property
    def places(self) -> bool:
        """Whether positions can be chosen, and the right ones give the right logits: else they explain nothing."""
        right = torch.arange(self.length, device=self.ids.device)
        return self.case.same(self.placed(right), self.case.alone(self.ids), self.ids)

    def placed(self, positions: Tensor) -> Tensor:
        """The right cache after all but the newest token, and the newest with the given positions: (vocab,)."""
        _, cache = self.case.subject(self.ids[:, :-1], None)
        logits, _ = self.case.subject.placed(self.ids, cache, positions)
        return logits[0, -1].cpu()


def attempt(experiment: Callable[[Trial], Finding | None], trial: Trial) -> Finding | None:
    try:
        return experiment(trial)
    except CALL_ERRORS:
        return None  # the model cannot be called as the experiment needs; it says nothing then


def _not_deterministic(trial: Trial) -> Finding | None:
    again = trial.run(trial.ids)
    if trial.is_like(again, trial.ids):
        return None
    return nondeterministic(trial.case.subject, float((again - trial.wrong).abs().max()))


def _is_of_text(trial: Trial, ids: Tensor) -> bool:
    """Whether the pattern returned what belongs to another text, (1, n)."""
    return trial.is_like(trial.case.alone(ids), ids)


def _context_lost(trial: Trial) -> Finding | None:
    if not _is_of_text(trial, trial.ids[:, -1:]):
        return None
    return Finding(
        "context lost",
        "The context is lost: the model sees the last token alone.",
        "the logits are those of the last token as a text of its own",
    )


def _newest_missing(trial: Trial) -> Finding | None:
    for missing in range(1, min(4, trial.length)):
        if _is_of_text(trial, trial.ids[:, :-missing]):
            return Finding(
                "stale context",
                "The context is stale: the newest tokens are not in it.",
                f"the logits are those of the text without its last {missing} token(s)",
            )
    return None


def _short_context(trial: Trial) -> Finding | None:
    if trial.length > _MOST_LENGTHS:
        return None
    for kept in range(2, trial.length):
        if _is_of_text(trial, trial.ids[:, -kept:]):
            return Finding(
                "short context",
                f"The context is short: only the last {kept} tokens count.",
                f"the logits are those of the last {kept} tokens as a text of their own",
            )
    return None


def _offset_lost(trial: Trial) -> Finding | None:
    positions = torch.arange(trial.length, device=trial.ids.device)
    positions[-1] = 0
    if not (trial.places and trial.is_like(trial.placed(positions), trial.ids)):
        return None
    return Finding(
        "offset lost",
        "The position offset is lost: the new token is computed at position 0, as if it began a text.",
        "the logits are those of the right cache with the newest token placed at position 0",
    )


def _order_lost(trial: Trial) -> Finding | None:
    positions = torch.arange(trial.length, device=trial.ids.device)
    positions[-1] = 0
    if not trial.places:
        return None
    all_at_zero = trial.placed(torch.zeros_like(positions))
    # Where cached keys keep their positions, the experiment cannot tell this from a lost offset.
    same_as_lost = trial.case.same(all_at_zero, trial.placed(positions), trial.ids)
    if trial.is_like(all_at_zero, trial.ids) and not same_as_lost:
        return Finding(
            "order lost",
            "The order is lost: all keys, cached and new, share one position.",
            "the logits are those of the right cache with every token placed at position 0",
        )
    return None


def _order_ignored(trial: Trial) -> Finding | None:
    if trial.length < 4:
        return None
    shuffled = torch.cat((trial.ids[:, :-1].flip(1), trial.ids[:, -1:]), dim=1)
    reference_moves = not trial.case.same(trial.case.alone(shuffled), trial.case.alone(trial.ids), trial.ids)
    if reference_moves and trial.is_like(trial.run(shuffled), shuffled):
        return Finding(
            "order lost",
            "The order is lost: all cached keys share one position.",
            "shuffling the earlier tokens changes the reference but not this pattern",
        )
    return None


def _offset_wrong(trial: Trial) -> Finding | None:
    for offset in _OFFSETS:
        positions = torch.arange(trial.length, device=trial.ids.device)
        positions[-1] = max(0, int(positions[-1]) + offset)
        if trial.places and trial.is_like(trial.placed(positions), trial.ids):
            return Finding(
                "offset wrong",
                f"The position offset is wrong: the new token is computed {offset:+d} position(s) from its own.",
                f"the logits are those of the right cache with the newest token moved by {offset:+d}",
            )
    return None


def _without_influence(trial: Trial) -> Finding | None:
    """Change each token in turn: which of them does the pattern not notice, though the reference does?"""
    last = trial.length - 1
    stride = -(-last // _MOST_INFLUENCES)
    unnoticed = []
    for position in range(last - 1, -1, -stride):
        changed = trial.ids.clone()
        changed[0, position] = trial.ids[0, position - 1] if position else trial.ids[0, last]
        if torch.equal(changed, trial.ids):
            continue
        if not trial.is_like(trial.run(changed), changed):
            continue
        expected = trial.case.alone(changed)
        moves = not trial.case.same(expected, trial.case.alone(trial.ids), changed)
        if moves and not trial.is_like(expected, changed):
            unnoticed.append(position)
    if not unnoticed:
        return None
    shown = ", ".join(map(str, sorted(unnoticed)[:8])) + (", ..." if len(unnoticed) > 8 else "")
    name = "short context" if min(unnoticed) == 0 or stride > 1 else "stale context"
    return Finding(
        name,
        "Part of the context is missing: the cache does not hold all earlier tokens.",
        f"changing the token at position {shown} of {trial.length} changes the reference but not this pattern",
    )


def _foreign_tokens(trial: Trial) -> Finding | None:
    for count in range(1, _MOST_FOREIGN + 1):
        padded = torch.cat((trial.ids.new_zeros(1, count), trial.ids), dim=1)
        if _is_of_text(trial, padded):
            return Finding(
                "padding read",
                "Padding is read as text: tokens that do not belong to the text stand in front of it.",
                f"the logits are those of {count} tokens of id 0 and then the text",
            )
    return None


def lookup_or_values(trial: Trial) -> Finding | None:
    """On a text of one token repeated, every key is like every other: faults of looking up keys vanish.

    Not to the last bit, where rounding depends on the order of sums; so what is left is held against what was there.
    """
    constant = trial.ids[:, -1:].expand(1, trial.length)
    before = _relative(trial.wrong, trial.case.alone(trial.ids))
    left = _relative(trial.run(constant), trial.case.alone(constant))
    if left < _VANISHED * before:
        return Finding(
            "lookup wrong",
            "What is looked up is wrong, not what is stored: tokens have wrong positions, keys are inexact, or some "
            "are not seen.",
            "on a text of one token repeated, where it does not matter which key is found, the difference vanishes",
        )
    if left < _STAYED * before:
        return None
    return Finding(
        "values wrong",
        "What is read from the cache is wrong: values are mixed up, changed or inexact, whichever key is found.",
        "the difference stays on a text of one token repeated, where it does not matter which key is found",
    )


def _relative(logits: Tensor, expected: Tensor) -> float:
    """How far logits are from expected ones, (vocab,), as a part of their size."""
    return distance(logits, expected) / max(size(expected), sys.float_info.min)


def _token_by_token(trial: Trial) -> Finding | None:
    """Without a prompt of several tokens: is the pattern right then, or right until the text has a certain length?"""
    if trial.length > _MOST_LENGTHS:
        return None
    first, again = (_first_wrong_length(trial, begin) for begin in (1, 3))
    if first is None:
        return Finding(
            "prompt cached wrongly",
            "What a prompt of several tokens leaves in the cache is wrong or incomplete.",
            "fed token by token from the first one on, the pattern is right",
        )
    if first != again or first <= 5:
        return None
    return Finding(
        "beyond a length",
        f"Texts are right up to {first - 1} positions and wrong from there on.",
        "that is so fed token by token, from 1 token on and from 3",
    )


def _first_tokens_missing(trial: Trial) -> Finding | None:
    """Fed token by token, nothing in the cache has ever seen a token that was dropped at once."""
    cache: Any = None
    for length in range(1, trial.length + 1):
        logits, cache = trial.call(trial.ids[:, :length], cache)
    for missing in range(1, min(4, trial.length)):
        if trial.case.same(logits[0, -1], trial.case.alone(trial.ids[:, missing:]), trial.ids[:, missing:]):
            return Finding(
                "short context",
                f"The context is short: the first {missing} token(s) of the text are not in the cache.",
                f"fed token by token, the logits are those of the text without its first {missing} token(s)",
            )
    return None


def _first_wrong_length(trial: Trial, begin: int) -> int | None:
    """The first length at which the pattern is wrong when it is fed token by token after `begin` tokens."""
    cache: Any = None
    for length in range(begin, trial.case.ids.shape[1] + 1):
        logits, cache = trial.call(trial.case.ids[:, :length], cache)
        text = trial.case.ids[:, :length]
        if not trial.case.same(logits[0, -1], trial.case.alone(text), text):
            return length
    return None


def nondeterministic(subject: Subject, difference: float) -> Finding:
    training = [] if subject.module is None else _in_training_mode(subject.module)
    why = (
        "dropout or stochastic depth is on. Put it in evaluation mode: model.eval()."
        if training
        else "a race, memory that was never written, or chance."
    )
    names = f"; in training mode: {', '.join(training[:5])}" if training else ""
    return Finding(
        "not deterministic",
        f"The model is not deterministic: {why}",
        f"two equal runs differ by {difference:.2g}{names}",
    )


def _in_training_mode(module: nn.Module) -> list[str]:
    """Names of the modules that are in training mode, those that act by chance first."""
    training = [(name, part) for name, part in module.named_modules() if part.training]
    random = [f"{name} ({type(part).__name__})" for name, part in training if "Drop" in type(part).__name__]
    return random or [name or type(part).__name__ for name, part in training]


EXPERIMENTS: tuple[Callable[[Trial], Finding | None], ...] = (
    _not_deterministic,
    _token_by_token,
    _foreign_tokens,
    _context_lost,
    _newest_missing,
    _short_context,
    _first_tokens_missing,
    _offset_lost,
    _order_lost,
    _order_ignored,
    _offset_wrong,
    _without_influence,
)
