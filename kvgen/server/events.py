"""The events of a job for one client, until all of its requests have ended or the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from starlette.exceptions import HTTPException
from starlette.requests import Request

from kvgen.errors import KvgenError
from kvgen.generation.events import ends
from kvgen.generation.settings import Request as Asked
from kvgen.generation.text import Chunk
from kvgen.server.answers import TimeLimitError
from kvgen.server.engine import Engine
from kvgen.server.schema import Job

LEFT = 499  # status of a client that left, as in nginx; only the log has it


class Dispatcher:
    """Brings the events of a pass to the event loop in one call, since each call costs the thread that computes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: list[tuple[Events, int, Chunk | KvgenError]] = []  # only the engine's thread changes it
        self._loop: asyncio.AbstractEventLoop | None = None
        engine.on_pass = self._deliver

    def submit(self, request: Asked, events: Events, index: int) -> int:
        """Queue a request of a job, whose events go to `events`; return its number, for `cancel`."""
        self._loop = asyncio.get_running_loop()
        return self._engine.submit(request, lambda event: self._held.append((events, index, event)))

    def cancel(self, number: int) -> None:
        self._engine.cancel(number)

    def _deliver(self) -> None:
        held, self._held = self._held, []
        if held and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, held)


def _put(held: list[tuple[Events, int, Chunk | KvgenError]]) -> None:
    for events, index, event in held:
        events.put(index, event)


class Events:
    """The events of all requests of a job, as they come: for each pass a list of (index, chunk).

    If the job is not a stream, they come when a request ends. Closing it cancels what has not ended.
    """

    def __init__(self, dispatcher: Dispatcher, job: Job, began: float, timeout: float | None) -> None:
        self._dispatcher, self._stream = dispatcher, job.stream
        self._arrived: deque[tuple[int, Chunk | KvgenError]] = deque()
        self._wake = asyncio.Event()
        self._open: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        try:
            for index, request in enumerate(job.requests):
                self._open[index] = dispatcher.submit(request, self, index)
        except KvgenError:
            self.cancel()
            raise
        if timeout is not None:
            error = TimeLimitError(f"the request took longer than {timeout:g} s")
            left = began + timeout - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(left, self.put, 0, error)

    def put(self, index: int, event: Chunk | KvgenError) -> None:
        self._arrived.append((index, event))
        if self._stream or ends(event):
            self._wake.set()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number in self._open.values():
            self._dispatcher.cancel(number)
        self._open.clear()

    async def first(self) -> list[tuple[int, Chunk]]:
        try:
            return await anext(self)
        except BaseException:
            self.cancel()
            raise

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> list[tuple[int, Chunk]]:
        if not self._open:
            raise StopAsyncIteration
        await self._wake.wait()
        chunks: list[tuple[int, Chunk]] = []
        while self._arrived:
            index, event = self._arrived[0]
            if isinstance(event, KvgenError):
                if chunks:  # they go first
                    return chunks
                self._open.pop(index, None)
                raise event
            self._arrived.popleft()
            chunks.append((index, event))
            if event.finish_reason is not None:
                del self._open[index]
        self._wake.clear()
        return chunks

    async def aclose(self) -> None:
        self.cancel()


class watched:  # noqa: N801 (used as a function)
    """Cancel what is inside when the client leaves, whose body has been read, and raise HTTPException."""

    def __init__(self, request: Request) -> None:
        self._request, self._task, self._left = request, asyncio.current_task(), False

    async def __aenter__(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._left = True
        if self._task is not None:
            self._task.cancel()

    async def __aexit__(self, kind: object, error: object, traceback: object) -> None:
        self._watcher.cancel()
        if self._left and isinstance(error, asyncio.CancelledError):
            raise HTTPException(LEFT, "the client left") from None
