"""The decoding loop. Each step passes every whole sequence to the model with its cache and chooses the next tokens.

One prompt is a batch of one. Uncached decoding is the same loop without passing a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kvgen.contract import ForwardBatch
from kvgen.errors import KvgenError, as_kvgen_error
from kvgen.generation.completion import Completion
from kvgen.generation.step import Step


@dataclass(eq=False, kw_only=True)
class Row:
    """A completion and the cache of its last pass.

    use_cache: False recomputes every position on each step. read: positions of the prompt that were computed before the
    first step, which counts them as its own.
    """

    completion: Completion
    cache: Any = None
    use_cache: bool = True
    read: int = 0


R = TypeVar("R", bound=Row)


def decode_step(forward: ForwardBatch, rows: Sequence[R]) -> Iterator[tuple[R, Step | KvgenError]]:
    """Run one pass over all rows; yield the next token of each, or several where drafts were right.

    A row that fails yields an error and is finished; the others continue. If the pass fails, every row gets its error.
    """
    if not rows:
        return
    ids = [row.completion.next_ids() for row in rows]
    caches = [row.cache if row.use_cache else None for row in rows]
    try:
        logits, caches = forward(ids, caches, [row.completion.count for row in rows])
    except KvgenError as error:
        for row in rows:
            row.completion.finished = True
            yield row, error
        return
    for row, row_logits, row.cache in zip(rows, logits, caches, strict=True):
        reused = getattr(row.cache, "reused", None) if row.use_cache else 0
        if reused is not None:
            reused, row.read = reused - row.read, 0
        try:
            for step in row.completion.take(row_logits, reused):
                yield row, step
        except Exception as error:  # noqa: BLE001 (a sampler may raise anything)
            row.completion.finished = True
            yield row, as_kvgen_error(error)


def decode(forward: ForwardBatch, row: Row) -> Iterator[Step]:
    """Decode one row to its end. Raises KvgenError if a step fails."""
    while not row.completion.finished:
        for _, step in decode_step(forward, [row]):
            if isinstance(step, KvgenError):
                raise step
            yield step
