"""The events of a job for one client, until all of its requests have ended or the client leaves."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request

from kvgen.errors import KvgenError
from kvgen.generation.text import Chunk
from kvgen.server.answers import TimeLimitError
from kvgen.server.engine import Engine
from kvgen.server.schema import Job

LEFT = 499  # status of a client that left, as in nginx; only the log has it


class Events:
    """The events of all requests of a job, (index, chunk), as they come. Closing it cancels what has not ended."""

    def __init__(self, engine: Engine, job: Job, began: float, timeout: float | None) -> None:
        self._engine, self._timeout, self._deadline = engine, timeout, None if timeout is None else began + timeout
        self._queue: asyncio.Queue[tuple[int, Chunk | KvgenError]] = asyncio.Queue()
        self._open: dict[int, int] = {}
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(job.requests):
                put = partial(self._put, loop, index)
                self._open[index] = engine.submit(request, put)
        except KvgenError:
            self.cancel()
            raise

    def _put(self, loop: asyncio.AbstractEventLoop, index: int, event: Chunk | KvgenError) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    def cancel(self) -> None:
        for number in self._open.values():
            self._engine.cancel(number)
        self._open.clear()

    async def first(self) -> tuple[int, Chunk]:
        try:
            return await anext(self)
        except BaseException:
            self.cancel()
            raise

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> tuple[int, Chunk]:
        if not self._open:
            raise StopAsyncIteration
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            index, event = await asyncio.wait_for(self._queue.get(), left)
        except TimeoutError:
            raise TimeLimitError(f"the request took longer than {self._timeout:g} s") from None
        if isinstance(event, KvgenError):
            del self._open[index]
            raise event
        if event.finish_reason is not None:
            del self._open[index]
        return index, event

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
