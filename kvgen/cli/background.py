"""A server in the background: `kvgen serve --detach` and `--stop-running`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from typer import Exit

from kvgen.cli.interrupts import raise_interrupts
from kvgen.cli.remote import API_KEY
from kvgen.cli.render import notes
from kvgen.cli.sockets import lock_of
from kvgen.errors import KvgenError, ServerError
from kvgen.system import runtime_dir


def background_socket() -> Path:
    """Return the path of the socket of `kvgen serve --detach`. Raises KvgenError as `runtime_dir`."""
    return runtime_dir() / "serve.sock"


def detached(log: Path, *, quiet: bool) -> Callable[[str], None]:
    """Continue in a child process, in a session of its own. Returns a function, which the child calls when it serves.

    The parent waits for that, prints what the function is given, and exits; or with the child's code if it ends before.
    From then on, the child writes to `log`.
    """
    ready, tell = os.pipe()
    child = os.fork()  # before torch is imported, whose threads would be missing in the child
    if child:
        os.close(tell)
        raise Exit(_wait_for(child, ready, quiet=quiet))
    os.close(ready)
    os.setsid()

    def serving(text: str) -> None:
        nothing = os.open(os.devnull, os.O_RDONLY)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source, target)
        os.write(tell, text.encode())
        os.close(tell)

    return serving


def _wait_for(child: int, ready: int, *, quiet: bool) -> int:
    """Wait until the child serves or ends; return the exit code."""
    raise_interrupts()
    try:
        with os.fdopen(ready) as pipe:
            text = pipe.read()
        if text:
            for line in text.splitlines():
                notes(quiet=quiet)(line)
            return 0
        _, status = os.waitpid(child, 0)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        raise
    return abs(os.waitstatus_to_exitcode(status)) or 1


def stop_background(path: Path) -> str:
    """End the server that has a socket, when its requests have ended. Returns what to tell the user.

    Raises KvgenError if there is none.
    """
    lock = FileLock(lock_of(path))
    try:
        with lock.acquire(blocking=False):
            raise KvgenError("no server runs in the background: kvgen serve --detach starts one")
    except Timeout:
        pass

    from kvgen.client.connection import ServerAddress

    try:
        pid = ServerAddress(f"unix:{path}", os.environ.get(API_KEY)).ask("/model")["pid"]
    except ServerError:
        raise KvgenError("the server in the background is not ready yet; try again") from None
    os.kill(pid, signal.SIGTERM)
    with lock:  # the system releases it when the process ends
        return f"stopped the server (pid {pid})"
