"""Uses of a cache beside the steps of one text: long texts, chunks, rewinds, several sequences, rows, special tokens.

Each is held against uncached logits of the very text that it used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgen.comparison.case import CALL_ERRORS, Case, random_text
from kvgen.comparison.reference import Judgement
from kvgen.comparison.rounding import LIMIT
from kvgen.comparison.run import run_forced
from kvgen.errors import CacheError, UnsupportedError, in_one_line

_STEPS_UNTIL = 68  # positions that are reached one at a time: past 64
_STEPS = 44  # calls with one more token each
_CROSSED = ((126, 131), (254, 259))  # where buffers that double are full
_LONGEST = max(end for _, end in _CROSSED)
_LONGEST_CHANGE = 1100  # positions at which something changes, and up to which passing it is quick
_BEYOND_CHANGE = 132  # positions behind a change: a window's buffer may have room for 64 or 128 more
_CHUNKS, _CHUNK_CALLS = (2, 3, 7), 3
_REWINDS = range(1, 9)
_STEPS_IN_TURN = 4
_ROWS = 3


@dataclass(frozen=True)
class Check:
    """What a use gave: logits, (steps, vocab), after the first `lengths` positions of `ids`, (1, n)."""

    ids: Tensor
    lengths: Sequence[int]
    logits: Tensor


@dataclass(frozen=True)
class Probe:
    """One use of the cache.

    ratio: its worst step in noise floors; None if it was not checked, and `note` says why. length: positions of the
    first wrong step. exact: whether all logits are the uncached ones bit for bit.
    """

    name: str
    ratio: float | None
    wrong: bool = False
    exact: bool = False
    length: int | None = None
    note: str = ""


def run_probes(case: Case) -> tuple[Probe, ...]:
    """Try every use that is quick. One that the model does not foresee is noted and does not count.

    A use raises UnsupportedError to say why it shows nothing on this model, CacheError for a cache that fails in it.
    """
    none = case.subject.changes_at is not None and _change(case) is None
    return tuple(_run(case, name, use) for name, use in USES.items() if not (none and use is _past_a_change))


def _run(case: Case, name: str, use: Callable[[Case], Iterator[Check]]) -> Probe:
    if name in _REWINDING and not case.subject.rewinds:
        return Probe(name, None, note="not checked: the model does not say that its cache may go back (rewinds = True)")
    worst, exact, length = 0.0, True, None
    try:
        for check in use(case):
            judged = case.reference.judge(
                check.logits, case.reference.rows(check.ids, check.lengths), check.ids, check.lengths
            )
            worst, exact = max(worst, judged.ratio), exact and judged.exact
            if judged.wrong and length is None:
                length = _first_wrong(judged, check)
    except UnsupportedError as reason:
        return Probe(name, None, note=f"not checked: {reason}")
    except CacheError as error:
        return Probe(name, None, wrong=True, note=str(error))
    except CALL_ERRORS as error:
        return Probe(name, None, note=f"not checked: the model fails ({in_one_line(error)})")
    return Probe(name, worst, length is not None, exact, length)


def _first_wrong(judged: Judgement, check: Check) -> int:
    pairs = zip(check.lengths, judged.distances, strict=True)
    return next(length for length, distance in pairs if distance > LIMIT * judged.floor)


def _more_steps(case: Case) -> Iterator[Check]:
    """One token at a time, further than the comparison itself goes."""
    last = _within(case, max(_STEPS_UNTIL, case.ids.shape[1] + 8))
    if case.ids.shape[1] >= last:
        raise UnsupportedError("the context ends before")
    ids = random_text(case, last)
    lengths = range(max(1, last - _STEPS), last + 1)
    case.reference.rows(ids, lengths)  # where this fails, the cache need not do better
    try:
        logits = run_forced(case.subject, ids, lengths[0], lengths).logits
    except CALL_ERRORS as error:
        raise CacheError(f"fails where uncached decoding does not: {in_one_line(error)}") from error
    yield Check(ids, lengths, logits)


def _long_texts(case: Case) -> Iterator[Check]:
    """Long prompts at once, and then steps past lengths at which buffers grow."""
    spans = [span for span in _CROSSED if span[1] <= _within(case, _LONGEST)]
    if not spans:
        raise UnsupportedError("the context ends before")
    yield from _crossed(case, spans)


def _past_a_change(case: Case) -> Iterator[Check]:
    """Past the smallest window, or what else changes at a length."""
    change = _change(case)
    if change is None:
        raise UnsupportedError("the model names no window or other length at which something changes")
    if change > _LONGEST_CHANGE:
        raise UnsupportedError(f"the first such length is {change}, which takes long")
    last = _within(case, change + _BEYOND_CHANGE)
    if last <= change:
        raise UnsupportedError("the context ends before")
    spans = [(max(1, change - 4), min(change + 6, last))]
    if last > change + 10:
        spans.append((last - 4, last))
    yield from _crossed(case, spans)


def _crossed(case: Case, spans: Sequence[tuple[int, int]]) -> Iterator[Check]:
    ids = random_text(case, max(end for _, end in spans))
    lengths = [length for begin, end in spans for length in range(begin, end + 1)]
    logits = [run_forced(case.subject, ids, begin, range(begin, end + 1)).logits for begin, end in spans]
    yield Check(ids, lengths, torch.cat(logits))


def _in_chunks(case: Case) -> Iterator[Check]:
    """The prompt in two parts, then several tokens on each call."""
    ids = random_text(case, _within(case, case.start + _CHUNK_CALLS * max(_CHUNKS)))
    for size in _CHUNKS:
        ends = [case.start + size * call for call in range(_CHUNK_CALLS + 1)]
        lengths = [case.start // 2 or 1, *(end for end in ends if end <= ids.shape[1])]
        yield Check(ids, lengths, run_forced(case.subject, ids, case.start, lengths).logits)


def _rewound(case: Case) -> Iterator[Check]:
    """The last tokens dropped and another put in their place: one, then two, and so on back from the end."""
    cache, end = None, 0
    for count in _REWINDS:
        if count >= case.ids.shape[1]:
            return
        if cache is None or end <= count:
            _, cache = case.subject(case.ids, None)
            end = case.ids.shape[1]
        end += 1 - count
        edited = case.ids[:, :end].clone()
        edited[:, -1] = _another(case, int(edited[0, -1]))
        logits, cache = case.subject(edited, cache)
        yield Check(edited, [end], logits[:, -1].cpu())


def _edited(case: Case) -> Iterator[Check]:
    """The whole text; then its last token replaced, back to the prompt, and a token inside the prompt replaced.

    Each leaves one position to compute, so that this asks nothing of calls with several new tokens. Last comes a text
    as long as the one before, with another token in its middle.
    """
    _, cache = case.subject(case.ids, None)
    for length in (case.ids.shape[1], case.start + 1, case.start // 2 + 1):
        edited = case.ids[:, :length].clone()
        edited[:, -1] = _another(case, int(edited[0, -1]))
        logits, cache = case.subject(edited, cache)
        yield Check(edited, [length], logits[:, -1].cpu())
    _, cache = case.subject(case.ids, None)
    edited, middle = case.ids.clone(), case.ids.shape[1] // 2
    edited[0, middle] = _another(case, int(edited[0, middle]))
    logits, _ = case.subject(edited, cache)
    yield Check(edited, [case.ids.shape[1]], logits[:, -1].cpu())


def _in_turn(case: Case) -> Iterator[Check]:
    """Two sequences, each with its own cache, one step of each in turn."""
    texts = [case.ids, case.ids.flip(1)]
    lengths = range(case.start, min(case.start + _STEPS_IN_TURN, case.ids.shape[1]))
    caches, rows = [None, None], [[], []]  # type: ignore[var-annotated]
    for length in lengths:
        for i, text in enumerate(texts):
            logits, caches[i] = case.subject(text[:, :length], caches[i])
            rows[i].append(logits[0, -1].cpu())
    for text, found in zip(texts, rows, strict=True):
        yield Check(text, lengths, torch.stack(found))


def _side_by_side(case: Case) -> Iterator[Check]:
    """Rows of one batch: the text, the text backwards, and the text turned about."""
    text = case.ids
    rows = torch.cat((text, text.flip(1), text.roll(text.shape[1] // 2, 1)))
    lengths, cache, found = range(case.start, min(case.start + _STEPS_IN_TURN, text.shape[1])), None, []
    for length in lengths:
        logits, cache = case.subject(rows[:, :length], cache)
        found.append(logits[:, -1].cpu())
    for row in range(_ROWS):
        yield Check(rows[row : row + 1], lengths, torch.stack([logits[row] for logits in found]))


def _with_special_tokens(case: Case) -> Iterator[Check]:
    """Special tokens in the prompt, and behind it."""
    count = case.expected.shape[1]
    special = sorted(id_ for id_ in case.special_ids if id_ < count)[:4]
    if not special:
        raise UnsupportedError("no special tokens are known")
    ids = case.ids[:, : case.start + 10].clone()
    ids[0, case.start // 2] = special[0]
    for place, id_ in zip(range(case.start + 1, ids.shape[1] - 2, 2), special, strict=False):
        ids[0, place] = id_
    lengths = range(case.start, ids.shape[1])
    yield Check(ids, lengths, run_forced(case.subject, ids, case.start).logits)


USES: dict[str, Callable[[Case], Iterator[Check]]] = {
    "more steps": _more_steps,
    "long texts": _long_texts,
    "past a window": _past_a_change,
    "several new tokens at once": _in_chunks,
    "rewinds": _rewound,
    "edits": _edited,
    "two sequences in turn": _in_turn,
    "rows of a batch": _side_by_side,
    "special tokens": _with_special_tokens,
}
_REWINDING = ("rewinds", "edits")


def unseen(case: Case) -> str:
    """What the uses above do not show, in one line."""
    change, context = _change(case), case.subject.context_length
    longest = max(case.ids.shape[1], _within(case, _LONGEST))
    if change is not None and change <= _LONGEST_CHANGE:
        longest = max(longest, _within(case, change + _BEYOND_CHANGE))
    parts = [] if context is not None and longest >= context else [f"texts beyond {longest} positions"]
    parts += [f"what changes at {length}" for length in case.subject.changes_at or () if length >= longest]
    return ", ".join([*parts, f"batches of more than {_ROWS} rows", f"chunks of other sizes than {_sizes()}"])


def _sizes() -> str:
    return ", ".join(map(str, _CHUNKS[:-1])) + f" and {_CHUNKS[-1]}"


def _change(case: Case) -> int | None:
    """The first length at which something changes, beyond those that single steps pass anyway."""
    return next((length for length in sorted(case.subject.changes_at or ()) if length >= _STEPS_UNTIL - 8), None)


def _within(case: Case, length: int) -> int:
    """A length, or the context if that ends before."""
    context = case.subject.context_length
    return length if context is None else min(length, context)


def _another(case: Case, id_: int) -> int:
    """A token of the text that is not this one."""
    return next((other for other in case.ids[0].tolist() if other != id_), (id_ + 1) % case.expected.shape[1])
