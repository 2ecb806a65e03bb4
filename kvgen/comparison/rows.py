"""Uses of a cache by rows of a batch that `--thorough` adds: many, moved, of different lengths, padded, in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from kvgen.comparison.case import Case, changed, random_text
from kvgen.comparison.run import run_forced
from kvgen.comparison.uses import EDITS, IN_CHUNKS, Check, Use, row_checks, stepped_rows, within
from kvgen.errors import UnsupportedError

ROWS = 8
_STEPS = 6
_SINGLE, _SEVERAL = (1,) * (_STEPS - 1), (2, 3, 1, 5)  # new tokens of a row in each call


def row_uses() -> Iterator[Use]:
    """Yield the uses. One that does not apply says so when it is run."""
    rows = ("rows mixed", "Rows of a batch are wrong, one sequence alone is right.")
    yield Use(f"2 to {ROWS} rows of a batch", _many_rows, rows)
    yield Use("rows in another order", _moved_rows, rows, rewinds=True)
    edited = (rows[0], "Rows of a batch are wrong after an edit, one sequence alone is right.")
    yield Use("edits of rows", _edited_rows, edited, rewinds=True, simpler=lambda length: EDITS)
    yield Use("rows of different lengths", partial(_uneven_rows, _SINGLE), rows)
    several = (rows[0], "Rows of a batch are wrong with several new tokens each, one sequence alone is right.")
    yield Use("rows in chunks", _rows_in_chunks, several, simpler=_alone)
    yield Use("rows of different lengths in chunks", partial(_uneven_rows, _SEVERAL), several, simpler=_alone)
    padding = ("padding", "Rows padded on the left are wrong.")
    yield Use("left padding", partial(_left_padding, _SINGLE), padding)
    padded = (padding[0], "Rows padded on the left are wrong with several new tokens each.")
    yield Use("left padding in chunks", partial(_left_padding, _SEVERAL), padded, simpler=_alone)


def _rows(case: Case, length: int) -> Tensor:
    """Different texts of one length, or as long as the context allows, (B, n)."""
    long = random_text(case, within(case, length + ROWS))
    return torch.cat([torch.roll(long, row, dims=1)[:, :length] for row in range(ROWS)])


def _many_rows(case: Case) -> Iterator[Check]:
    """Rows of one batch, all of one length: two of them, three, and so on."""
    rows = _rows(case, min(case.ids.shape[1], case.start + _STEPS))
    for count in range(2, ROWS + 1):
        yield from stepped_rows(case, rows[:count], range(case.start, rows.shape[1] + 1))


def _moved_rows(case: Case) -> Iterator[Check]:
    """Rows of one batch that change places before each step, as in beam search. Each then has another text."""
    rows = _rows(case, min(case.ids.shape[1], case.start + _STEPS))
    yield from stepped_rows(case, rows, range(case.start, rows.shape[1] + 1), turn=1)


def _edited_rows(case: Case) -> Iterator[Check]:
    """Rows of one batch with another token in the middle of each, then without their last tokens."""
    rows = _rows(case, min(case.ids.shape[1], case.start + _STEPS))
    length = rows.shape[1]
    _, cache = case.subject(rows, None)
    middle = torch.cat([changed(case, row[None], length // 2) for row in rows])
    shorter = torch.cat([changed(case, row[None, : length - 2], length - 3) for row in middle])
    for edited in (middle, shorter):
        logits, cache = case.subject(edited, cache)
        yield from row_checks(edited[:, None], [[edited.shape[1]]] * len(edited), logits[:, -1:].cpu())


def _rows_in_chunks(case: Case) -> Iterator[Check]:
    """Rows of one batch, all of one length, with several new tokens each."""
    ends = _ends(case, _SEVERAL, case.start)
    yield from stepped_rows(case, _rows(case, ends[-1]), ends)


def _uneven_rows(sizes: Sequence[int], case: Case) -> Iterator[Check]:
    """Rows of different lengths in one pass each; every other step one of them is missing.

    sizes: new tokens of a row in each pass, which other rows take in another order.
    """
    if not case.subject.backend.batches:
        raise UnsupportedError("the model computes one sequence at a time")
    texts, starts = _uneven_texts(case, sizes)
    caches: list[object] = [None] * len(texts)
    found: list[list[Tensor]] = [[] for _ in texts]
    ends: list[list[int]] = [[] for _ in texts]
    for step in range(len(sizes) + 1):
        present = [row for row in range(len(texts)) if not (step % 2 and row == step % len(texts))]
        for row in present:
            ends[row].append(ends[row][-1] + sizes[(step + row) % len(sizes)] if ends[row] else starts[row])
        sequences = [texts[row][:, : ends[row][-1]] for row in present]
        logits, new = case.subject.forward_batch(sequences, [caches[row] for row in present], [1] * len(present))
        for row, row_logits, cache in zip(present, logits, new, strict=True):
            found[row].append(row_logits[-1].cpu())
            caches[row] = cache
    yield from row_checks(texts, ends, list(map(torch.stack, found)))


def _left_padding(sizes: Sequence[int], case: Case) -> Iterator[Check]:
    """Rows of different lengths, padded on the left. sizes: new tokens of every row in each call."""
    texts, starts = _uneven_texts(case, sizes)
    ends = [_ends(case, sizes, start) for start in starts]
    found, cache = [], None
    for lengths in zip(*ends, strict=True):
        rows = [text[:, :length] for text, length in zip(texts, lengths, strict=True)]
        logits, cache = case.subject.left_padded(rows, cache)
        found.append(logits[:, -1].cpu())
    yield from row_checks(texts, ends, torch.stack(found, dim=1))


def _alone(length: int) -> Use:
    """The texts of these rows in the same chunks, one after the other."""
    return Use("rows alone in chunks", _rows_alone, IN_CHUNKS)


def _rows_alone(case: Case) -> Iterator[Check]:
    texts, starts = _uneven_texts(case, _SEVERAL)
    for text, start in zip(texts, starts, strict=True):
        ends = _ends(case, _SEVERAL, start)
        yield Check(text, ends, run_forced(case.subject, text, start, ends).logits)


def _ends(case: Case, sizes: Sequence[int], start: int) -> list[int]:
    """Lengths of a text after `start` tokens, and after each further chunk."""
    if within(case, start + sum(sizes)) < start + sum(sizes):
        raise UnsupportedError("the context is too short")
    return list(accumulate(sizes, initial=start))


def _uneven_texts(case: Case, sizes: Sequence[int]) -> tuple[list[Tensor], list[int]]:
    """Texts, (1, n) each, and the different lengths that they start with."""
    ids = random_text(case, max(case.ids.shape[1], _ends(case, sizes, case.start + 1)[-1]))
    texts = [ids, ids.flip(1), ids[:, 1:]]
    return texts, [max(1, case.start // (row + 1)) for row in range(len(texts))]
