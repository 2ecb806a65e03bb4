"""Uses of a cache that `--thorough` adds: every window, many chunk sizes, edits far back, saved caches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from kvgen.comparison.case import Case, another, changed, random_text
from kvgen.comparison.rows import ROWS, row_uses
from kvgen.comparison.run import run_forced
from kvgen.comparison.uses import BEFORE, IN_CHUNKS, Check, Use, crossed, in_turn, steps_to, within
from kvgen.errors import UnsupportedError

LENGTHS = (128, 512, 2048)
CHUNKS = (1, 2, 3, 7, 64, 512)
_LONGEST_CHANGE = 1 << 14
_FEW = 256  # chunk sizes from here on are tried twice in a text instead of three times
_LONG = 300  # positions of a text that is edited
_REWINDS = (1, 2, 16, 64, 100)
_EVERY = 32  # largest of the chunk sizes that are all tried
_FEW_CALLS, _CALLS = 64, 264  # single steps with one cache: more than others make, and past 256
_STEPS = 6
_LATE = 4  # the token that differs late, from the end
_BEFORE = "the text computed before"


def thorough_uses(case: Case) -> Iterator[Use]:
    """Yield the uses for a model. One that does not apply says so when it is run."""
    for length in LENGTHS:
        sentence = f"Some steps past {length} positions are wrong."
        yield _use(f"past {length} positions", _past, ("longer texts", sentence), length)
    if (context := case.subject.context_length) is not None and LENGTHS[0] < context < LENGTHS[-1]:
        last = ("longer texts", "Some of the last steps in the context are wrong.")
        yield _use("up to the end of the context", _past, last, context - _STEPS)
    for change in sorted({*(case.subject.changes_at or ())}):
        sentence = f"Some steps past {change} positions, where the model changes, are wrong."
        yield _use(f"past the change at {change}", _past_a_change, ("longer texts", sentence), change)
    every = len(_growing_ends(case))
    yield Use(f"chunks of 1 to {every}", _growing_chunks, IN_CHUNKS, simpler=partial(steps_to, every))
    for size in sorted({*CHUNKS, *case.subject.chunk_sizes, *(size + 1 for size in case.subject.chunk_sizes)}):
        sentence = f"Texts in chunks of {size} are wrong."
        yield _use(f"chunks of {size}", _in_chunks, ("chunk boundary", sentence), size)
    many = ("many calls", "The cache is wrong after many calls; as long a text is right in few.")
    yield Use("many calls", _many_calls, many, simpler=partial(steps_to, 0))
    edited = ("edits not noticed", "The cache is wrong after an edit far from its end.")
    yield Use("edits of a long text", _long_edits, edited, rewinds=True)
    rewound = ("edits not noticed", "The cache is wrong after many tokens were removed.")
    yield Use("rewinds of a long text", _long_rewinds, rewound, rewinds=True)
    stale = ("stale state", "The cache is wrong after other texts were computed.")
    yield Use("the same text after others", _after_others, stale, rewinds=True)
    again = ("stale state", "The cache is wrong if a text is computed twice, or one that differs late after it.")
    yield Use("the same text twice", _twice, again, rewinds=True)
    yield Use("the same text in new caches", _twice_anew, again)
    yield Use("after other sequences", _beside_others, ("sequences mixed", stale[1]))
    yield Use(
        "sequences that begin alike", _alike, ("sequences mixed", "Two sequences that begin alike are wrong in turn.")
    )
    yield Use("saved and loaded", _saved, ("saved caches", "A cache is wrong after it was saved and loaded."))
    yield from row_uses()


def not_tested(case: Case) -> str:
    """Describe in one line what these uses do not test."""
    context = case.subject.context_length
    longest = max([*LENGTHS, *(c for c in case.subject.changes_at or () if c <= _LONGEST_CHANGE)])
    parts = [] if context is not None and context <= longest else [f"texts far beyond {longest} positions"]
    return ", ".join([*parts, f"batches of more than {ROWS} rows"])


def _use(name: str, run: Callable[[int, Case], Iterator[Check]], finding: tuple[str, str], number: int) -> Use:
    simpler = partial(steps_to, number) if run is _in_chunks else None
    return Use(name, partial(run, number), finding, simpler=simpler)


def _past(number: int, case: Case) -> Iterator[Check]:
    """A prompt that ends shortly before a length, then single steps past it."""
    if within(case, number + 4) <= number:
        raise UnsupportedError("the context is too short")
    yield from crossed(case, [(max(1, number - 3), within(case, number + 4))])


def _past_a_change(number: int, case: Case) -> Iterator[Check]:
    """Steps past the length; steps behind a prompt that is longer at once; and twice that length."""
    if number > _LONGEST_CHANGE:
        raise UnsupportedError(f"a text of {number} positions would take too long")
    if within(case, number + 6) <= number:
        raise UnsupportedError("the context is too short")
    begins = (max(1, number - 4), number + 70, 2 * number + 1)
    spans = [(begin, within(case, begin + 10)) for begin in begins if begin < within(case, begin + 10)]
    yield from crossed(case, spans)


def _in_chunks(number: int, case: Case) -> Iterator[Check]:
    """The whole text in chunks of one size, then single steps."""
    count = 24 if number == 1 else 3 if number < _FEW else 2
    ends = [end for end in range(number, number * count + 1, number) if end + 2 == within(case, end + 2)]
    if len(ends) < 2:
        raise UnsupportedError("the context is too short")
    ends += [ends[-1] + 1, ends[-1] + 2]
    ids = random_text(case, ends[-1])
    yield Check(ids, ends, run_forced(case.subject, ids, 1, ends).logits)


def _growing_ends(case: Case) -> list[int]:
    """Where chunks of 1, 2, 3 and so on end in one text, with room for a step after the last."""
    context = case.subject.context_length or math.inf
    return [end for end in accumulate(range(1, _EVERY + 1)) if end < context]


def _growing_chunks(case: Case) -> Iterator[Check]:
    """One text in chunks of 1, 2, 3 and so on, then a single step."""
    ends = _growing_ends(case)
    lengths = [*ends, ends[-1] + 1]
    ids = random_text(case, lengths[-1])
    words = [*(f"{size} new tokens, after {size - 1}" for size in range(1, len(lengths))), "a step after them"]
    yield Check(ids, lengths, run_forced(case.subject, ids, 1, lengths).logits, words=words)


def _many_calls(case: Case) -> Iterator[Check]:
    """Single steps from the first token on."""
    ids = random_text(case, within(case, _CALLS))
    if ids.shape[1] <= _FEW_CALLS:
        raise UnsupportedError("the context is too short")
    lengths = range(1, ids.shape[1] + 1)
    logits = run_forced(case.subject, ids, 1, lengths).logits
    yield Check(ids, lengths, logits, words=[f"call {length}" for length in lengths])


def _long_text(case: Case) -> Tensor:
    """A text that is longer than the smallest window, where that is possible quickly, (1, n)."""
    change = min((change for change in case.subject.changes_at or () if change <= _LONGEST_CHANGE // 8), default=0)
    return random_text(case, within(case, max(_LONG, change + 40)))


def _long_edits(case: Case) -> Iterator[Check]:
    """Change one token, near the end, in the middle and at the start, and go on for some steps."""
    text = _long_text(case)
    length = text.shape[1] - 2
    for place in (length - 1, length - 2, length - 20, length // 2, 1, 0):
        if not 0 <= place < length:
            continue
        _, cache = case.subject(text[:, :length], None)
        edited = changed(case, text, place)
        lengths = range(length, length + 3)
        yield Check(edited, lengths, run_forced(case.subject, edited, length, lengths, cache).logits, {BEFORE: text})


def _long_rewinds(case: Case) -> Iterator[Check]:
    """Remove tokens from the end, fewer and more, and continue differently: several tokens at once, then steps."""
    text = _long_text(case)[:, :-2]  # what follows the shortest rewind is two tokens longer
    for count in (*_REWINDS, text.shape[1] // 2, text.shape[1] - 1):
        if count >= text.shape[1]:
            continue
        _, cache = case.subject(text, None)
        other = text[:, : text.shape[1] - count]
        new = text.flip(1)[:, :3].clone()
        new[0, 0] = another(case, int(text[0, other.shape[1]]))
        other = torch.cat((other, new), dim=1)
        lengths = range(other.shape[1] - 1, other.shape[1] + 1)
        yield Check(other, lengths, run_forced(case.subject, other, 1, lengths, cache).logits, {"the old text": text})


def _other_texts(case: Case) -> list[Tensor]:
    """Texts that share nothing, a start, or all but the start with the text of the case, (1, n) each."""
    text, half = case.ids, case.ids.shape[1] // 2
    return [text.flip(1), changed(case, text, half), text[:, :half], text[:, 1:]]


def _after_others(case: Case) -> Iterator[Check]:
    """One cache for the text, then for others, then for the text again, where it goes on."""
    cut = case.start + 1
    _, cache = case.subject(case.ids[:, :cut], None)
    for other in _other_texts(case):
        _, cache = case.subject(other, cache)
        lengths = range(cut, min(cut + _STEPS, case.ids.shape[1] + 1))
        run = run_forced(case.subject, case.ids, cut, lengths, cache)
        cache = run.cache
        yield Check(case.ids, lengths, run.logits, {_BEFORE: other})


def _nearly_equal(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Texts in the order in which to compute them, each with the one before it, (1, n): equal ones, ones that differ
    late but not in their last tokens, and another between."""
    text = case.ids[:, : case.start + _STEPS]
    other = changed(case, text, max(0, text.shape[1] - _LATE))
    order = [text, text, other, other, text, text.flip(1), text]
    return list(zip(order, [text, *order], strict=False))


def _twice(case: Case) -> Iterator[Check]:
    """One cache for all these texts."""
    cache = None
    for ids, before in _nearly_equal(case):
        logits, cache = case.subject(ids, cache)
        yield Check(ids, [ids.shape[1]], logits[:, -1].cpu(), {_BEFORE: before})


def _twice_anew(case: Case) -> Iterator[Check]:
    """A new cache for each of these texts: all but the last tokens at once, then single steps."""
    for ids, before in _nearly_equal(case):
        start = max(1, ids.shape[1] - _LATE + 2)
        lengths = range(start, ids.shape[1] + 1)
        yield Check(ids, lengths, run_forced(case.subject, ids, start, lengths).logits, {_BEFORE: before})


def _alike(case: Case) -> Iterator[Check]:
    """The text, and one of the same prompt that goes on otherwise, one step of each in turn."""
    other = random_text(case, case.ids.shape[1] - case.start)
    yield from in_turn(case, torch.cat((case.ids[:, : case.start], other), dim=1))


def _beside_others(case: Case) -> Iterator[Check]:
    """Caches of other sequences are made and dropped between the steps of one."""
    lengths, rows, cache = range(case.start, min(case.start + _STEPS, case.ids.shape[1] + 1)), [], None
    others = _other_texts(case)
    for step, length in enumerate(lengths):
        logits, cache = case.subject(case.ids[:, :length], cache)
        rows.append(logits[0, -1].cpu())
        case.subject(others[step % len(others)], None)
    named = {f"another sequence ({number})": other for number, other in enumerate(others, start=1)}
    yield Check(case.ids, lengths, torch.stack(rows), named)


def _saved(case: Case) -> Iterator[Check]:
    """Go on with a saved and loaded cache, and with the original after it."""
    cut = max(case.start, case.ids.shape[1] // 2)
    _, cache = case.subject(case.ids[:, :cut], None)
    loaded = case.subject.stored(cache)
    other = case.ids.clone()
    other[0, cut:] = case.ids[0, cut:].flip(0)
    lengths = range(cut + 1, min(cut + 1 + _STEPS, case.ids.shape[1] + 1))
    for ids, kept in ((other, loaded), (case.ids, cache)):
        beside = case.ids if ids is other else other
        logits = run_forced(case.subject, ids, cut, lengths, kept).logits
        yield Check(ids, lengths, logits, {"the text of the other cache": beside})
