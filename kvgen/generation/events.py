"""The events of requests that are completed side by side: chunks, or an error, with the number of the request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from kvgen.errors import KvgenError
from kvgen.generation.settings import Request
from kvgen.generation.text import Chunk


class Completer(Protocol):
    """Completes requests side by side: a `Batch`, here or on a server."""

    def run(
        self, requests: Iterable[Request | KvgenError], admit: Callable[[], bool] = ...
    ) -> Iterator[tuple[int, Chunk | KvgenError]]:
        """See `Batch.run`."""


def ends(event: Chunk | KvgenError) -> bool:
    """Whether this is the last event of its request."""
    return isinstance(event, KvgenError) or event.finish_reason is not None


def in_order(events: Iterable[tuple[int, Chunk | KvgenError]]) -> Iterator[tuple[int, Chunk | KvgenError]]:
    """Yield the events of `Batch.run` grouped by request, in the order of requests, as early as possible."""
    held: dict[int, list[Chunk | KvgenError]] = defaultdict(list)
    current = 0
    for number, event in events:
        held[number].append(event)
        while current in held:
            ready = held.pop(current)
            for one in ready:
                yield current, one
            if not ends(ready[-1]):
                break
            current += 1
