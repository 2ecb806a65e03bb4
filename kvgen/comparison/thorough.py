"""Uses of a cache that `--thorough` adds: every window, many chunk sizes, edits far back, padding, saved caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvgen.comparison.case import Case, random_text
from kvgen.comparison.run import run_forced
from kvgen.comparison.uses import BEFORE, Check, Use, another, changed, crossed, row_checks, stepped_rows, within
from kvgen.errors import UnsupportedError

LENGTHS = (128, 512, 2048)
CHUNKS = (1, 2, 3, 7, 64, 512)
_LONGEST_CHANGE = 1 << 14
_FEW = 256  # chunk sizes from here on are tried twice in a text instead of three times
_LONG = 300  # positions of a text that is edited
_REWINDS = (1, 2, 16, 64, 100)
_STEPS = 6
_ROWS = 8


def thorough_uses(case: Case) -> Iterator[Use]:
    """Yield the uses for a model. One that does not apply says so when it is run."""
    for length in LENGTHS:
        yield _use(
            f"past {length} positions",
            _past,
            ("longer texts", f"Some steps past {length} positions are wrong."),
            length,
        )
    for change in sorted({*(case.subject.changes_at or ())}):
        sentence = f"Some steps past {change} positions, where the model changes, are wrong."
        yield _use(f"past the change at {change}", _past_a_change, ("longer texts", sentence), change)
    for size in sorted({*CHUNKS, *case.subject.chunk_sizes, *(size + 1 for size in case.subject.chunk_sizes)}):
        sentence = f"Texts in chunks of {size} are wrong."
        yield _use(f"chunks of {size}", _in_chunks, ("chunk boundary", sentence), size)
    edited = ("edits not noticed", "The cache is wrong after an edit far from its end.")
    yield Use("edits of a long text", _long_edits, edited, rewinds=True)
    rewound = ("edits not noticed", "The cache is wrong after many tokens were removed.")
    yield Use("rewinds of a long text", _long_rewinds, rewound, rewinds=True)
    stale = ("stale state", "The cache is wrong after other texts were computed.")
    yield Use("the same text after others", _after_others, stale, rewinds=True)
    yield Use("after other sequences", _beside_others, ("sequences mixed", stale[1]))
    yield Use("saved and loaded", _saved, ("saved caches", "A cache is wrong after it was saved and loaded."))
    rows = ("rows mixed", "Rows of a batch are wrong, one sequence alone is right.")
    yield Use(f"{_ROWS} rows of a batch", _many_rows, rows)
    yield Use("rows in another order", _moved_rows, rows)
    yield Use("rows of different lengths", _uneven_rows, rows)
    yield Use("left padding", _left_padding, ("padding", "Rows padded on the left are wrong."))


def not_tested(case: Case) -> str:
    """Describe in one line what these uses do not test."""
    context = case.subject.context_length
    longest = max([*LENGTHS, *(c for c in case.subject.changes_at or () if c <= _LONGEST_CHANGE)])
    parts = [] if context is not None and context <= longest else [f"texts far beyond {longest} positions"]
    return ", ".join([*parts, f"batches of more than {_ROWS} rows"])


def _use(name: str, run: Callable[[int, Case], Iterator[Check]], finding: tuple[str, str], number: int) -> Use:
    return Use(name, partial(run, number), finding)


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
    ends = [end for end in range(number, number * count + 1, number) if end < within(case, end + 2)]
    if len(ends) < 2:
        raise UnsupportedError("the context is too short")
    ends += [ends[-1] + 1, ends[-1] + 2]
    ids = random_text(case, ends[-1])
    yield Check(ids, ends, run_forced(case.subject, ids, 1, ends).logits)


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
        yield Check(case.ids, lengths, run.logits, {"the text computed before": other})


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


def _rows(case: Case) -> Tensor:
    """Different texts of one length, (B, n)."""
    length = min(case.ids.shape[1], case.start + _STEPS)
    long = random_text(case, within(case, length + _ROWS))
    return torch.cat([torch.roll(long, row, dims=1)[:, :length] for row in range(_ROWS)])


def _many_rows(case: Case) -> Iterator[Check]:
    """Rows of one batch, all of one length."""
    rows = _rows(case)
    yield from stepped_rows(case, rows, range(case.start, rows.shape[1] + 1))


def _moved_rows(case: Case) -> Iterator[Check]:
    """Rows of one batch that change places before each step, as in beam search."""
    rows = _rows(case)
    yield from stepped_rows(case, rows, range(case.start, rows.shape[1] + 1), turn=1)


def _uneven_rows(case: Case) -> Iterator[Check]:
    """Rows of different lengths in one pass each; every other step one of them is missing."""
    if not case.subject.backend.batches:
        raise UnsupportedError("the model computes one sequence at a time")
    texts, lengths = _uneven_texts(case)
    caches: list[object] = [None] * len(texts)
    found: list[list[Tensor]] = [[] for _ in texts]
    for step in range(_STEPS):
        present = [row for row in range(len(texts)) if not (step % 2 and row == step % len(texts))]
        sequences = [texts[row][:, : lengths[row] + len(found[row])] for row in present]
        logits, new = case.subject.forward_batch(sequences, [caches[row] for row in present], [1] * len(present))
        for row, row_logits, cache in zip(present, logits, new, strict=True):
            found[row].append(row_logits[-1].cpu())
            caches[row] = cache
    yield from row_checks(
        texts, [range(n, n + len(rows)) for n, rows in zip(lengths, found, strict=True)], list(map(torch.stack, found))
    )


def _left_padding(case: Case) -> Iterator[Check]:
    texts, lengths = _uneven_texts(case)
    found, cache = [], None
    for step in range(_STEPS):
        rows = [text[:, : length + step] for text, length in zip(texts, lengths, strict=True)]
        logits, cache = case.subject.left_padded(rows, cache)
        found.append(logits[:, -1].cpu())
    yield from row_checks(texts, [range(n, n + _STEPS) for n in lengths], torch.stack(found, dim=1))


def _uneven_texts(case: Case) -> tuple[list[Tensor], list[int]]:
    """Texts, (1, n) each, and the different lengths that they start with."""
    texts = [case.ids, case.ids.flip(1), case.ids[:, 1:]]
    return texts, [max(1, case.start // (row + 1)) for row in range(len(texts))]
