"""Requests that a server completes, with the events that `Batch` yields."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from kvgen.client.connection import Connection, ServerAddress
from kvgen.client.wire import read_event, request_as_json
from kvgen.errors import KvgenError, ServerError
from kvgen.generation.events import ends
from kvgen.generation.prefetch import Prefetcher
from kvgen.generation.settings import Request
from kvgen.generation.text import Chunk

_TIMEOUT = 0.1  # seconds after which to look for further requests

_Event = tuple[int, "Chunk | KvgenError", float]


class RemoteBatch:
    """Completes requests on a server, as `Batch` does here. Closing what it returns ends its requests on the server.

    batch_size: most requests at a time. expect: takes the ids whose texts may be asked for.

    Attributes: `cache`, always None, because caches stay on the server; `pass_began`, when the request that the last
    chunk belongs to was sent, in seconds of `time.perf_counter`.
    """

    cache: Any = None

    def __init__(self, server: ServerAddress, batch_size: int, expect: Callable[[Sequence[int]], None]) -> None:
        self.pass_began = 0.0
        self._server, self._batch_size, self._expect = server, batch_size, expect

    def complete(self, request: Request) -> Generator[Chunk, None, None]:
        """See `Batch.complete`; an invalid request raises at the first chunk."""
        return self._chunks(request, self._server.connect())

    def run(
        self, requests: Iterable[Request | KvgenError], admit: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[int, Chunk | KvgenError]]:
        """See `Batch.run`. Raises ServerError if the server ends meanwhile."""
        events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        open_: dict[int, Connection] = {}
        number, failure = 0, None
        with closing(Prefetcher(requests, self._batch_size)) as source:
            try:
                while True:
                    while len(open_) < self._batch_size and not source.ended and failure is None and admit():
                        try:
                            request = source.take(wait=not open_)
                        except Exception as error:  # noqa: BLE001 (raised when the earlier rows have ended)
                            failure = error
                            break
                        if request is None:
                            break
                        if isinstance(request, ServerError):
                            raise request
                        if isinstance(request, KvgenError):
                            yield number, request
                        else:
                            open_[number] = self._server.connect()
                            send = partial(self._send, number, request, open_[number], events)
                            threading.Thread(target=send, daemon=True).start()
                        number += 1
                    if open_:
                        yield from self._next(events, open_)
                    elif failure is not None:
                        raise failure
                    elif source.ended or not admit():
                        return
            finally:
                for connection in open_.values():
                    connection.abort()

    def _next(
        self, events: queue.SimpleQueue[_Event], open_: dict[int, Connection]
    ) -> Iterator[tuple[int, Chunk | KvgenError]]:
        try:
            number, event, self.pass_began = events.get(timeout=_TIMEOUT)
        except queue.Empty:
            return
        if isinstance(event, ServerError):
            raise event
        if ends(event):
            del open_[number]
        yield number, event

    def _send(self, number: int, request: Request, connection: Connection, events: queue.SimpleQueue[_Event]) -> None:
        """Put the events of a request into a queue, on a thread."""
        began = time.perf_counter()
        try:
            for chunk in self._chunks(request, connection):
                events.put((number, chunk, began))
        except KvgenError as error:
            events.put((number, error, began))

    def _chunks(self, request: Request, connection: Connection) -> Generator[Chunk, None, None]:
        with closing(self._server.lines("/run", request_as_json(request), connection)) as lines:
            for line in lines:
                chunk = read_event(line)
                step = chunk.step
                if step.logprob is not None:
                    self._expect((step.token, *(id_ for id_, _ in step.top_logprobs)))
                yield chunk
                if chunk.finish_reason is not None:
                    return
        raise self._server.lost()
