"""Experiments that tell explanations apart: calls on texts where one explanation predicts what the others do not.

Each takes a trial and returns a finding if its explanation holds. None looks inside a model or a cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from kvgen.comparison.case import CALL_ERRORS, changed
from kvgen.comparison.lengths import MAX_LENGTH, token_by_token
from kvgen.comparison.rounding import distance, size
from kvgen.comparison.trial import Finding, Trial, nondeterministic

T = TypeVar("T")

VALUES_WRONG = "values wrong"
STAYS = "the difference stays on a text of one repeated token, where any key is as good as another"
_REPEATS = 2  # what is wrong at times may be so twice
_OFFSETS = (-2, -1, 1, 2)
_MAX_PADDING = 8
_MAX_EDITS = 24
_VANISHED, _STAYED = 1 / 50, 1 / 4  # relative to the difference before


def attempt(experiment: Callable[[Trial], T], trial: Trial) -> T | None:
    try:
        return experiment(trial)
    except CALL_ERRORS:
        return None  # the model cannot be called as the experiment needs; it says nothing then


def _not_deterministic(trial: Trial) -> Finding | None:
    for _ in range(_REPEATS):
        again = trial.run(trial.ids)
        if not trial.is_like(again, trial.ids):
            return nondeterministic(trial.case.subject, float((again - trial.wrong).abs().max()))
    return None


def _is_of_text(trial: Trial, ids: Tensor) -> bool:
    """Whether the pattern returned the logits of a different text, (1, n)."""
    return trial.is_like(trial.case.last_logits(ids), ids)


def _context_lost(trial: Trial) -> Finding | None:
    if _is_of_text(trial, trial.ids[:, -1:]):
        evidence = "the logits are those of the last token alone"
    elif _only_last_token_counts(trial):  # at its position, whose rounding alone may set it apart
        evidence = "replacing all earlier tokens changes the reference but not this pattern"
    else:
        return None
    return Finding("context lost", "The context is lost: the model sees only the last token.", evidence)


def _only_last_token_counts(trial: Trial) -> bool:
    replaced = trial.ids.roll(1, 1)
    replaced[0, -1] = trial.ids[0, -1]
    expected, last = trial.case.last_logits(replaced), changed(trial.case, trial.ids, -1)
    return (
        not trial.case.close(expected, trial.case.last_logits(trial.ids), trial.ids)
        and trial.is_like(trial.run(replaced), replaced)
        and not trial.is_like(trial.run(last), last)
    )


def _newest_missing(trial: Trial) -> Finding | None:
    for missing in range(1, min(4, trial.length)):
        if _is_of_text(trial, trial.ids[:, :-missing]):
            return Finding(
                "stale context",
                "The context is stale: the newest tokens are missing.",
                f"the logits are those of the text without its last {missing} token(s)",
            )
    return None


def _short_context(trial: Trial) -> Finding | None:
    if trial.length > MAX_LENGTH:
        return None
    for kept in range(2, trial.length):
        if _is_of_text(trial, trial.ids[:, -kept:]):
            return Finding(
                "short context",
                f"The context is short: only the last {kept} tokens count.",
                f"the logits are those of the last {kept} tokens alone",
            )
    return None


def _offset_lost(trial: Trial) -> Finding | None:
    positions = torch.arange(trial.length, device=trial.ids.device)
    positions[-1] = 0
    if not (trial.places and trial.is_like(trial.with_positions(positions), trial.ids)):
        return None
    return Finding(
        "offset lost",
        "The position offset is lost: the new token is computed at position 0, like the start of a text.",
        "the logits are those of the right cache with the newest token placed at position 0",
    )


def _shifted(trial: Trial) -> Finding | None:
    """Adding one number to all logits changes no probability."""
    expected = trial.case.last_logits(trial.ids)
    shift = (trial.wrong.double() - expected.double()).median()
    if not trial.is_like((expected.double() + shift).to(expected.dtype), trial.ids):
        return None
    return Finding(
        "constant shift",
        "All cached logits are shifted by the same number; their probabilities are right.",
        f"they are the uncached logits plus {float(shift):.3g}",
    )


def _order_lost(trial: Trial) -> Finding | None:
    positions = torch.arange(trial.length, device=trial.ids.device)
    positions[-1] = 0
    if not trial.places:
        return None
    all_at_zero = trial.with_positions(torch.zeros_like(positions))
    # If cached keys keep their positions, this experiment cannot tell a lost order from a lost offset.
    same_as_lost = trial.case.close(all_at_zero, trial.with_positions(positions), trial.ids)
    if trial.is_like(all_at_zero, trial.ids) and not same_as_lost:
        return Finding(
            "order lost",
            "The order is lost: all keys, cached and new, have the same position.",
            "the logits are those of the right cache with every token placed at position 0",
        )
    return None


def _order_ignored(trial: Trial) -> Finding | None:
    if trial.length < 4:
        return None
    shuffled = torch.cat((trial.ids[:, :-1].flip(1), trial.ids[:, -1:]), dim=1)
    reference_moves = not trial.case.close(
        trial.case.last_logits(shuffled), trial.case.last_logits(trial.ids), trial.ids
    )
    if reference_moves and trial.is_like(trial.run(shuffled), shuffled):
        return Finding(
            "order lost",
            "The order is lost: all cached keys have the same position.",
            "reversing the earlier tokens changes the reference but not this pattern",
        )
    return None


def _offset_wrong(trial: Trial) -> Finding | None:
    """Move the newest token as the pattern does; or, if the model moves the positions that it is given, back again."""
    for offset in _OFFSETS:
        positions = torch.arange(trial.length, device=trial.ids.device)
        positions[-1] = max(0, int(positions[-1]) + offset)
        moved = trial.with_positions(positions)
        if trial.places and trial.is_like(moved, trial.ids):
            by, evidence = offset, f"the logits are those of the right cache with the newest token moved by {offset:+d}"
        elif not trial.places and trial.case.close(moved, trial.case.last_logits(trial.ids), trial.ids):
            by, evidence = -offset, f"with the newest token moved by {offset:+d} the logits are right"
        else:
            continue
        text = f"The position offset is wrong: the new token is computed at its position {by:+d}."
        return Finding("offset wrong", text, evidence)
    return None


def _without_influence(trial: Trial) -> Finding | None:
    """Change each token in turn and look for changes that the reference notices and the pattern does not."""
    last = trial.length - 1
    stride = -(-last // _MAX_EDITS)
    unnoticed = []
    for position in range(last - 1, -1, -stride):
        other = trial.ids.clone()
        other[0, position] = trial.ids[0, position - 1] if position else trial.ids[0, last]
        if torch.equal(other, trial.ids):
            continue
        if not trial.is_like(trial.run(other), other):
            continue
        expected = trial.case.last_logits(other)
        moves = not trial.case.close(expected, trial.case.last_logits(trial.ids), other)
        if moves and not trial.is_like(expected, other):
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
    for count in range(1, _MAX_PADDING + 1):
        padded = torch.cat((trial.ids.new_zeros(1, count), trial.ids), dim=1)
        if _is_of_text(trial, padded):
            return Finding(
                "padding read",
                "Padding is read as text: the model sees extra tokens in front of the text.",
                f"the logits are those of {count} tokens of id 0 followed by the text",
            )
    return None


def lookup_or_values(trial: Trial) -> Finding | None:
    """Tell what is found from what is read: on one token repeated all keys are alike, so errors in finding them vanish.

    Rounding still depends on the order of sums, so the remaining difference is compared with the original one.
    """
    constant = trial.ids[:, -1:].expand(1, trial.length)
    before = _relative(trial.wrong, trial.case.last_logits(trial.ids))
    expected, shorter = trial.case.last_logits(constant), trial.case.last_logits(constant[:, : trial.length // 2])
    if _relative(shorter, expected) > _VANISHED * before:
        return None  # keys or values depend on positions, as with learned positions: this tells nothing
    left = _relative(trial.run(constant), expected)
    if left < _VANISHED * before:
        return _steps_lost(trial) or Finding(
            "lookup wrong",
            "Cached entries are found or read at the wrong place: positions or keys are wrong, some are not seen, or "
            "values of other tokens are read.",
            "on a text of one repeated token, where any key is as good as another, the difference vanishes",
        )
    if left < _STAYED * before:
        return None
    return Finding(
        VALUES_WRONG,
        "What is read, or computed from it, is wrong, whichever key is found: stored values, or the output of cached "
        "calls.",
        STAYS,
    )


def _steps_lost(trial: Trial) -> Finding | None:
    _, cache = trial.call(trial.ids[:, :-1], None)
    if not trial.case.close(trial.call(trial.ids, cache)[0][0, -1], trial.case.last_logits(trial.ids), trial.ids):
        return None
    return Finding(
        "stale context",
        "The context is stale: the cache does not keep all that single steps compute.",
        "with all but the newest token as the prompt, the logits are right",
    )


def _relative(logits: Tensor, expected: Tensor) -> float:
    """Distance from the expected logits, (vocab,), relative to their size."""
    return distance(logits, expected) / max(size(expected), sys.float_info.min)


def _first_tokens_missing(trial: Trial) -> Finding | None:
    """Feed token by token: then no cached position has ever seen a token that was dropped at once."""
    logits = trial.run(trial.ids, start=1)
    for missing in range(1, min(4, trial.length)):
        if trial.case.close(logits, trial.case.last_logits(trial.ids[:, missing:]), trial.ids[:, missing:]):
            return Finding(
                "short context",
                f"The context is short: the first {missing} token(s) of the text are not in the cache.",
                f"fed token by token, the logits are those of the text without its first {missing} token(s)",
            )
    return None


PREDICTIONS: tuple[Callable[[Trial], Finding | None], ...] = (
    _not_deterministic,
    _context_lost,
    _offset_lost,
    _order_lost,
    _offset_wrong,
    _newest_missing,
    _shifted,
    _short_context,
    _first_tokens_missing,
    _foreign_tokens,
)
"""Each predicts the very logits that its cause gives, so the first that holds is the explanation."""

OBSERVATIONS: tuple[Callable[[Trial], Finding | None], ...] = (token_by_token, _order_ignored, _without_influence)
"""Each sees one side of a fault; several may hold."""
