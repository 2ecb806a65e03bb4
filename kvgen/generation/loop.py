"""The one decoding loop. Each step hands the model every whole sequence, with its cache, and takes the next tokens.

    while not all(row.completion.finished for row in rows):
        for row, step in decode_step(model.forward_batch, rows): ...

One prompt is a batch of one. Uncached decoding is the same loop with no cache handed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvgen.contract import ForwardBatch
from kvgen.errors import KvgenError, of_item
from kvgen.generation.completion import Completion, Step


@dataclass(eq=False, kw_only=True)
class Row:
    """A completion and the cache of its last pass."""

    completion: Completion
    cache: Any = None


R = TypeVar("R", bound=Row)


def decode_step(
    forward: ForwardBatch, rows: Sequence[R], *, use_cache: bool = True
) -> Iterator[tuple[R, Step | KvgenError]]:
    """One pass over all rows: the next token of each, or several where drafts were right.

    A row that fails gives an error, is finished, and does not stop the others. A pass that fails is the error of all.
    """
    ids = [row.completion.next_ids() for row in rows]
    caches = [row.cache if use_cache else None for row in rows]
    try:
        logits, caches = forward(ids, caches, [row.completion.count for row in rows])
    except KvgenError as error:
        for row in rows:
            row.completion.finished = True
            yield row, error
        return
    for row, row_logits, row.cache in zip(rows, logits, caches, strict=True):
        reused = getattr(row.cache, "reused", None) if use_cache else 0
        try:
            for step in row.completion.take(row_logits, reused):
                yield row, step
        except Exception as error:  # noqa: BLE001 (samplers meet odd settings; the other rows go on)
            row.completion.finished = True
            yield row, of_item(error)
