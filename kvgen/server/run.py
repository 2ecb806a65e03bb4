"""Run the application until a signal, or until it has been idle for long."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvgen.server.engine import Engine

SENDING_SECONDS = 60.0  # that a client may take to send a request
_EVERY = 0.2  # seconds between looks at the clock


class Protocol(H11Protocol):
    """Ends a connection whose client does not send all of a request in time, since there are only so many."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._restart_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(SENDING_SECONDS, self._end_unless_sent)

    def _end_unless_sent(self) -> None:
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self.transport.abort()


class _Server(uvicorn.Server):
    """The first signal lets requests end, the second stops at once. on_signal: called after the first."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_signal = on_signal
        self.loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.loop is not None and not self.force_exit:
            self.loop.call_soon_threadsafe(self.on_signal)  # a signal's handler should not write


def run_server(
    app: ASGIApp,
    listening: Sequence[socket.socket],
    engine: Engine,
    idle_timeout: float | None,
    on_signal: Callable[[], None],
) -> bool:
    """Serve on bound sockets, then close the engine. Returns whether requests could end: not after a second signal.

    idle_timeout: seconds without a request after which to stop; None for never. on_signal: called after the first
    Ctrl-C or SIGTERM.
    """
    config = uvicorn.Config(
        app, http=Protocol, ws="none", log_config=None, lifespan="off", access_log=False, server_header=False
    )
    server = _Server(config, on_signal)

    async def serve() -> None:
        server.loop = asyncio.get_running_loop()
        watching = None if idle_timeout is None else asyncio.create_task(_stop_when_idle(server, engine, idle_timeout))
        await server.serve(list(listening))
        if server.force_exit:
            logging.getLogger("uvicorn.error").disabled = True  # it reports a request that is cut as a failure
        if watching is not None:
            watching.cancel()

    try:
        asyncio.run(serve())
    finally:
        engine.close()
    return not server.force_exit


async def _stop_when_idle(server: uvicorn.Server, engine: Engine, seconds: float) -> None:
    while engine.running or engine.waiting or time.monotonic() < engine.last_active + seconds:
        await asyncio.sleep(_EVERY)
    server.should_exit = True
