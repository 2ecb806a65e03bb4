"""Run one `Batch` on a thread, for requests that come and go. Knows no HTTP."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from kvgen.errors import CancelledError, KvgenError, as_kvgen_error
from kvgen.generation.batch import Batch
from kvgen.generation.events import ends
from kvgen.generation.settings import DEFAULT_BATCH_SIZE, Request
from kvgen.generation.text import Chunk
from kvgen.loading.load import Loaded

Emit = Callable[["Chunk | KvgenError"], None]
"""Receives the events of a request on the engine's thread, so it must return at once."""

DEFAULT_MAX_WAITING = 256

T = TypeVar("T")


class BusyError(KvgenError):
    """Too many requests wait already."""


@dataclass
class Counts:
    """Totals since the start, for metrics."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused: int = 0
    computed: int = 0


@dataclass
class _Pending:
    emit: Emit
    last: float
    begun: bool = False


class Engine:
    """Completes requests of any threads side by side.

    batch_size: most rows at a time. max_cache_bytes: for all caches, those of finished rows included. max_waiting: most
    requests that wait for a row. kept: caches to begin with, the least recently used first.

    Attributes: `counts`; `running` and `waiting`, requests with and without a first token; `last_active`, when the last
    request ended, in seconds of `time.monotonic`; `on_token`, called on the engine's thread for each token, with the
    seconds since the request or its last token, and whether it is the first; `on_pass`, called there when the events of
    a pass have been emitted.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_cache_bytes: int | None = None,
        max_waiting: int = DEFAULT_MAX_WAITING,
        kept: Sequence[Any] = (),
    ) -> None:
        self.loaded, self.counts = loaded, Counts()
        self.on_token: Callable[[float, bool], None] = lambda seconds, first: None
        self.on_pass: Callable[[], None] = lambda: None
        self.last_active = time.monotonic()
        self._max_waiting = max_waiting + batch_size
        self._batch = Batch(
            loaded,
            batch_size=batch_size,
            max_cache_bytes=max_cache_bytes,
            divide_prompts=True,
            kept=kept,
            max_kept=4 * batch_size,  # where memory bounds nothing
        )
        self._pending: dict[int, _Pending] = {}
        self._submitted = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Request | KvgenError | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvgen-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return sum(pending.begun for pending in list(self._pending.values()))

    @property
    def waiting(self) -> int:
        return sum(not pending.begun for pending in list(self._pending.values()))

    @property
    def kept(self) -> list[Any]:
        """The caches of finished rows, the least recently used first; when `close` has ended the others."""
        return self._batch.kept

    @property
    def kept_bytes(self) -> int:
        """Memory of the caches of finished rows."""
        return self._batch.kept_bytes

    def submit(self, request: Request, emit: Emit) -> int:
        """Queue a request; return its number, for `cancel`. Its last event is an error or has a finish_reason.

        Raises BusyError if too many requests wait.
        """
        with self._lock:
            if len(self._pending) >= self._max_waiting:
                raise BusyError(f"{len(self._pending)} requests are in progress or waiting; try again later")
            return self._enqueue(request, emit)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function between passes, on the thread that computes; it takes its turn as requests do."""
        future: Future[T] = Future()

        def run(turn: Chunk | KvgenError) -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # noqa: BLE001 (whoever waits raises it)
                    future.set_exception(error)

        with self._lock:
            self._enqueue(CancelledError("a call, not a request"), run)  # comes back when its turn has come
        return future

    def _enqueue(self, item: Request | KvgenError, emit: Emit) -> int:
        number, self._submitted = self._submitted, self._submitted + 1
        self._pending[number] = _Pending(emit, time.monotonic())
        self._queue.put(item)
        return number

    def cancel(self, number: int) -> None:
        """End a request before its next pass, unless it has ended."""
        with self._lock:
            if number in self._pending:
                self._batch.cancel(number)

    def close(self) -> None:
        """Cancel what is left and end the thread."""
        for number in list(self._pending):
            self._batch.cancel(number)
        self._queue.put(None)
        self._thread.join()

    def _requests(self) -> Iterator[Request | KvgenError]:
        while (request := self._queue.get()) is not None:
            yield request

    def _run(self) -> None:
        try:
            with closing(self._batch.passes(self._requests())) as passes:
                for events in passes:
                    for number, event in events:
                        self._emit(number, event)
                    self.on_pass()
        except Exception as error:  # noqa: BLE001 (whoever waits must hear of it)
            for number in list(self._pending):
                self._emit(number, as_kvgen_error(error))
            self.on_pass()

    def _emit(self, number: int, event: Chunk | KvgenError) -> None:
        pending, now = self._pending[number], time.monotonic()
        if isinstance(event, Chunk):
            self.on_token(now - pending.last, not pending.begun)
            self.counts.prompt_tokens += 0 if pending.begun else event.step.positions
            self.counts.completion_tokens += 1
            self.counts.reused += event.step.reused or 0
            self.counts.computed += event.step.computed or 0
            pending.last, pending.begun = now, True
        if ends(event):
            with self._lock:
                del self._pending[number]
            self.last_active = now
        pending.emit(event)
