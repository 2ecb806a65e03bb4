"""Uses of a cache that every comparison tries: longer texts, chunks, rewinds, several sequences, special tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from kvgen.comparison.case import CALL_ERRORS, Case, changed, random_text, swapped
from kvgen.comparison.run import run_forced
from kvgen.errors import CacheError, UnsupportedError, in_one_line

_STEPS_UNTIL = 68  # positions reached by single steps: past 64
_MORE_STEPS = 14  # single steps after a text that is longer
_CROSSED = ((127, 130), (255, 258))  # lengths where buffers that double are full
_LONGEST = max(end for _, end in _CROSSED)
_LONGEST_CHANGE = 1100  # largest window that can be passed quickly
_BEYOND_CHANGE = 132  # positions beyond a window: its buffer may have room for 64 or 128 more
_CHUNKS = (2, 3, 7)
_MOST_STEPS = 64  # single steps instead of a chunk
_REWINDS = range(1, 9)
_EDITED_STEPS = 12  # single steps in a text that is rewound or edited
_STEPS_IN_TURN = 4
_ROWS = 3
BEFORE = "the text before the edit"


@dataclass(frozen=True)
class Check:
    """Logits of a use, (steps, vocab), after the first `lengths` positions of `ids`, (1, n).

    others: other texts of this use, (1, n) each, whose logits a wrong cache might return, each with its description.
    words: what each step tries, if its length does not say.
    """

    ids: Tensor
    lengths: Sequence[int]
    logits: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Use:
    """A use of the cache. name: in reports. finding: a short key and a sentence, if it is wrong. rewinds: whether it
    takes text back, which not every cache allows. simpler: given the positions of the first wrong step, a simpler use
    of as many, which must be right for the finding to hold; else what is wrong is what that one is named for.
    of_tokens: whether the finding is about the tokens of its texts."""

    name: str
    run: Callable[[Case], Iterator[Check]]
    finding: tuple[str, str]
    rewinds: bool = False
    simpler: Callable[[int], Use] | None = None
    of_tokens: bool = False


def _more_steps(case: Case) -> Iterator[Check]:
    """Single steps that continue the comparison itself, with its cache."""
    first = case.ids.shape[1]
    last = within(case, max(_STEPS_UNTIL, first + _MORE_STEPS))
    ids, lengths = random_text(case, last), range(first, last + 1)
    case.reference.step_logits(ids, lengths)  # if this fails, the cache need not do better
    try:
        logits = run_forced(case.subject, ids, first, lengths, case.cache).logits
    except CALL_ERRORS as error:
        raise CacheError(f"fails where uncached decoding works: {in_one_line(error)}") from error
    yield Check(ids, lengths, logits)


def _long_texts(case: Case) -> Iterator[Check]:
    """A long prompt in one call, then single steps past lengths where buffers grow."""
    spans = [span for span in _CROSSED if span[1] <= within(case, _LONGEST)]
    if not spans:
        raise UnsupportedError("the context is too short")
    yield from crossed(case, spans)


def _past_a_change(case: Case) -> Iterator[Check]:
    """Steps past the smallest window, or another length where the model changes."""
    change = first_change(case)
    if change is None:
        raise UnsupportedError("the model does not declare windows or other lengths where it changes")
    if change > _LONGEST_CHANGE:
        raise UnsupportedError(f"the first such length, {change}, would take too long")
    last = within(case, change + _BEYOND_CHANGE)
    if last <= change:
        raise UnsupportedError("the context is too short")
    spans = [(max(1, change - 4), min(change + 6, last))]
    if last > change + 10:
        spans.append((last - 4, last))
    yield from crossed(case, spans)


def steps_of(text: Tensor, case: Case) -> Iterator[Check]:
    """Single steps over a text, (1, n), behind a prompt like that of the case."""
    start = min(case.start, text.shape[1] - 1)
    lengths = range(start, text.shape[1] + 1)
    yield Check(text, lengths, run_forced(case.subject, text, start, lengths).logits)


def crossed(case: Case, spans: Sequence[tuple[int, int]]) -> Iterator[Check]:
    ids = random_text(case, max(end for _, end in spans))
    lengths = [length for begin, end in spans for length in range(begin, end + 1)]
    logits = [run_forced(case.subject, ids, begin, range(begin, end + 1)).logits for begin, end in spans]
    yield Check(ids, lengths, torch.cat(logits))


def _in_chunks(case: Case) -> Iterator[Check]:
    """The prompt in two chunks, then several tokens on each call."""
    ends = list(accumulate((*_CHUNKS, *_CHUNKS), initial=case.start))
    ids = random_text(case, within(case, ends[-1]))
    lengths = [case.start // 2 or 1, *(end for end in ends if end <= ids.shape[1])]
    yield Check(ids, lengths, run_forced(case.subject, ids, case.start, lengths).logits)


def _rewound(case: Case) -> Iterator[Check]:
    """Remove the last tokens and append a different one: 1, then 2, and so on up to 8. Remove some, append nothing."""
    text, cache, end = _short_text(case), None, 0
    for count in _REWINDS:
        if count >= text.shape[1]:
            break
        if cache is None or end <= count:
            _, cache = case.subject(text, None)
            end = text.shape[1]
        end += 1 - count
        edited = changed(case, text[:, :end], end - 1)
        logits, cache = case.subject(edited, cache)
        yield Check(edited, [end], logits[:, -1].cpu())
    _, cache = case.subject(text, None)
    for shorter in (text[:, :-1], text[:, :-4]):
        if shorter.shape[1]:
            logits, cache = case.subject(shorter, cache)
            yield Check(shorter, [shorter.shape[1]], logits[:, -1].cpu())


def _edited(case: Case) -> Iterator[Check]:
    """Replace the last token of the text, the first token after the prompt, and a token inside the prompt.

    Each leaves one position to compute, so calls with several new tokens are not tested here. The last edits keep the
    length: they change a token in the middle, and swap two.
    """
    text = _short_text(case)
    _, cache = case.subject(text, None)
    for length in (text.shape[1], case.start + 1, case.start // 2 + 1):
        edited = changed(case, text[:, :length], -1)
        logits, cache = case.subject(edited, cache)
        yield Check(edited, [length], logits[:, -1].cpu(), {BEFORE: text})
    for edited in (changed(case, text, text.shape[1] // 2), swapped(text)):
        _, cache = case.subject(text, None)
        logits, _ = case.subject(edited, cache)
        yield Check(edited, [text.shape[1]], logits[:, -1].cpu(), {BEFORE: text})


def _short_text(case: Case) -> Tensor:
    """The beginning of the text, (1, n): long enough to rewind, and quick to compute."""
    return case.ids[:, : case.start + _EDITED_STEPS]


def _in_turn(case: Case) -> Iterator[Check]:
    """Two sequences with a cache each, one step of each in turn."""
    yield from in_turn(case, case.ids.flip(1))


def in_turn(case: Case, other: Tensor) -> Iterator[Check]:
    """The text and another, (1, n), with a cache each, one step of each in turn."""
    texts = [case.ids, other]
    lengths = range(case.start, min(case.start + _STEPS_IN_TURN, case.ids.shape[1]))
    caches, rows = [None, None], [[], []]  # type: ignore[var-annotated]
    for length in lengths:
        for i, text in enumerate(texts):
            logits, caches[i] = case.subject(text[:, :length], caches[i])
            rows[i].append(logits[0, -1].cpu())
    for text, other, found in zip(texts, reversed(texts), rows, strict=True):
        yield Check(text, lengths, torch.stack(found), {"the other sequence": other})


def _side_by_side(case: Case) -> Iterator[Check]:
    """Rows of one batch: the text, the text reversed, and the text with a different first token."""
    text = case.ids
    rows = torch.cat((text, text.flip(1), changed(case, text, 0)))
    yield from stepped_rows(case, rows, range(case.start, min(case.start + _STEPS_IN_TURN, text.shape[1])))


def stepped_rows(case: Case, rows: Tensor, lengths: Sequence[int], turn: int = 0) -> Iterator[Check]:
    """Pass rows of one batch, (B, n), step by step. turn: by how many places they move before each step."""
    cache, found = None, []
    for step, length in enumerate(lengths):
        logits, cache = case.subject(rows.roll(step * turn, 0)[:, :length], cache)
        found.append(logits[:, -1].cpu().roll(-step * turn, 0))
    yield from row_checks(rows[:, None], [lengths] * len(rows), torch.stack(found, dim=1))


def row_checks(
    texts: Sequence[Tensor] | Tensor, lengths: Sequence[Sequence[int]], logits: Sequence[Tensor] | Tensor
) -> Iterator[Check]:
    """Check each row of a batch. texts: (1, n) each. logits: (steps, vocab) each."""
    for row, (text, row_lengths, row_logits) in enumerate(zip(texts, lengths, logits, strict=True)):
        others = {f"row {other + 1} of the batch": texts[other] for other in range(len(texts)) if other != row}
        yield Check(text, row_lengths, row_logits, others)


def _with_special_tokens(case: Case) -> Iterator[Check]:
    """Special tokens in the prompt and after it."""
    count = case.expected.shape[1]
    special = sorted(id_ for id_ in case.special_ids if id_ < count)[:4]
    if not special:
        raise UnsupportedError("the tokenizer has no special tokens")
    ids = case.ids[:, : case.start + 10].clone()
    ids[0, case.start // 2] = special[0]
    for place, id_ in zip(range(case.start + 1, ids.shape[1] - 2, 2), special, strict=False):
        ids[0, place] = id_
    lengths = range(case.start, ids.shape[1])
    yield Check(ids, lengths, run_forced(case.subject, ids, case.start).logits)


_LONGER, _EDITS = "longer texts", "edits not noticed"
LONG_TEXTS = (_LONGER, "Some steps of long texts are wrong, those of a short one are right.")
IN_CHUNKS = ("chunk boundary", "Calls with some number of new tokens are wrong.")


def steps_to(count: int, length: int) -> Use:
    """Single steps over the last positions of a text, `count` or a few, behind a prompt of all before them."""
    begin = max(1, length - min(count, _MOST_STEPS) - 3)
    return Use(f"steps up to {length} positions", partial(crossed, spans=[(begin, length)]), LONG_TEXTS)


EDITS = Use("edits", _edited, (_EDITS, "The cache is wrong after the text was edited."), rewinds=True)

_USES = (
    Use("more steps", _more_steps, (_LONGER, "The first steps are right, some later ones are wrong.")),
    Use("long texts", _long_texts, LONG_TEXTS),
    Use("past a window", _past_a_change, (_LONGER, "Some steps past a window are wrong, the first ones are right.")),
    Use(
        "several new tokens at once",
        _in_chunks,
        ("multi-token calls", "Calls with several new tokens are wrong."),
        simpler=partial(steps_to, _CHUNKS[-1]),
    ),
    Use("rewinds", _rewound, (_EDITS, "The cache is wrong after the last tokens were removed."), rewinds=True),
    EDITS,
    Use("two sequences in turn", _in_turn, ("sequences mixed", "Two sequences in turn are wrong, one alone is right.")),
    Use("rows of a batch", _side_by_side, ("rows mixed", "Rows of a batch are wrong, one sequence alone is right.")),
    Use(
        "special tokens",
        _with_special_tokens,
        ("special tokens", "Texts that contain special tokens are wrong."),
        of_tokens=True,
    ),
)


def default_uses(case: Case) -> tuple[Use, ...]:
    """Return the uses that apply to a model."""
    none = case.subject.changes_at is not None and first_change(case) is None
    return tuple(use for use in _USES if not (none and use.run is _past_a_change))


def not_tested(case: Case) -> str:
    """Describe in one line what these uses do not test."""
    change, context = first_change(case), case.subject.context_length
    longest = max(case.ids.shape[1], within(case, _LONGEST))
    if change is not None and change <= _LONGEST_CHANGE:
        longest = max(longest, within(case, change + _BEYOND_CHANGE))
    parts = [] if context is not None and longest >= context else [f"texts beyond {longest} positions"]
    parts += [f"changes at {length} positions" for length in case.subject.changes_at or () if length >= longest]
    return ", ".join([*parts, f"batches of other than {_ROWS} rows", f"chunk sizes other than {_in_words(_CHUNKS)}"])


def _in_words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"


def first_change(case: Case) -> int | None:
    """The first length where the model changes beyond those that single steps pass."""
    return next((length for length in sorted(case.subject.changes_at or ()) if length >= _STEPS_UNTIL - 8), None)


def within(case: Case, length: int) -> int:
    """`length`, limited to the context."""
    context = case.subject.context_length
    return length if context is None else min(length, context)
