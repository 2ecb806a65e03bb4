"""kvgen as a user runs it: in processes of its own, with pipes or a terminal.

`run`, `start`, `run_on_terminal` and `run_python` fork them from a server that has imported kvgen and torch already,
since a short command spends most of its time on that. Tests of how a process starts (signals at once, what is imported,
stdout or stderr closed) run `KVGEN`.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import multiprocessing
import os
import pkgutil
import pty
import resource
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, TextIO

import kvgen

KVGEN = [sys.executable, "-m", "kvgen"]
CLOSED = -1  # in place of a file descriptor
_TIMEOUT = 300
_LOST = 10  # seconds of silence after which a Ctrl-C is pressed again

_server = multiprocessing.get_context("forkserver")
# Typer imports Pydantic with `_adapters`, when it first reads a command line. Libraries of engines take seconds, and
# huggingface_hub, which comes with one, keeps the cache folder of its import.
_modules = [module.name for module in pkgutil.walk_packages(kvgen.__path__, "kvgen.") if ".engines" not in module.name]
_server.set_forkserver_preload(["torch", "typer._adapters", "tests.program", *_modules])


def run(
    *arguments: str,
    input: str | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
    code: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run kvgen to its end; it is killed after some minutes.

    stdin: a file descriptor or `CLOSED`, where there is no `input`; None for an empty one. stdout, stderr: file
    descriptors to write to; None for pipes, whose contents are returned. limits: of its resources, as for
    `resource.setrlimit`. code: see `run_python`.
    """
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        streams = [os.pipe() for _ in range(3)]
        (read_input, write_input), (read_out, write_out), (read_err, write_err) = streams
        given = (stdin, stdout, stderr)
        theirs = [
            ours if fd is None else fd for fd, ours in zip(given, (read_input, write_out, write_err), strict=True)
        ]
        process = _started(arguments, os.environ if env is None else env, theirs, limits, code)
        for fd in (read_input, write_out, write_err):
            os.close(fd)
        outputs = [stack.enter_context(os.fdopen(fd)) for fd in (read_out, read_err)]
        pool.submit(_write, write_input, input or "")
        hung = threading.Timer(_TIMEOUT, process.kill)
        hung.start()
        out, errors = pool.map(lambda stream: stream.read(), outputs)
        process.join()
        hung.cancel()
    assert process.exitcode is not None
    return subprocess.CompletedProcess(list(arguments), process.exitcode, out, errors)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program with `sys.argv[1:]` where kvgen and torch are imported already."""
    return run(*arguments, code=code)


@contextlib.contextmanager
def start(
    *arguments: str, stderr: int | None = None, env: Mapping[str, str] | None = None
) -> Iterator[tuple[TextIO, TextIO, ForkServerProcess]]:
    """Run kvgen beside a test: yields its stdin, its stdout, and the process, which does not outlive the block.

    stderr: a file descriptor to write to; None for that of the tests.
    """
    (read_input, write_input), (read_out, write_out) = os.pipe(), os.pipe()
    streams = [read_input, write_out, sys.__stderr__.fileno() if stderr is None else stderr]
    process = _started(arguments, os.environ if env is None else env, streams)
    os.close(read_input)
    os.close(write_out)
    hung = threading.Timer(_TIMEOUT, process.kill)
    hung.start()
    try:
        with os.fdopen(write_input, "w", 1) as stdin, os.fdopen(read_out) as stdout:
            yield stdin, stdout, process
    finally:
        hung.cancel()
        process.kill()
        process.join()


def run_on_terminal(
    *arguments: str,
    interrupt_after: str | None = None,
    script: Iterable[tuple[str, str]] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Run on a pseudo-terminal; returns the exit code and all that the terminal got.

    interrupt_after: press Ctrl-C when this text has come. script: texts to wait for, one after the other, each with
    what is typed then. environment: for the program, besides what is there.
    """
    steps = iter(script if interrupt_after is None else [(interrupt_after, "\x03")])
    terminal, theirs = pty.openpty()
    given = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **(environment or {})}
    process = _started(arguments, given, [theirs] * 3)
    os.close(theirs)
    output, seen = b"", 0
    typed, (wanted, to_type) = "", next(steps, ("", ""))
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], _LOST)
        if not ready:
            if typed == "\x03":  # Python loses one that comes just before it begins to wait for input
                os.write(terminal, b"\x03")
            continue
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            break
        if b"\x1b[6n" in data:  # where is the cursor?
            os.write(terminal, b"\x1b[1;1R")
        output += data
        while wanted and (found := output.find(wanted.encode(), seen)) >= 0:  # several may come at once
            seen = found + len(wanted.encode())
            os.write(terminal, to_type.encode())
            typed, (wanted, to_type) = to_type, next(steps, ("", ""))
    else:
        process.kill()
        raise TimeoutError(f"{arguments} waits for {wanted!r} and more after {output[-500:]!r}")
    process.join(_TIMEOUT)
    os.close(terminal)
    assert process.exitcode is not None
    return process.exitcode, output.decode()


def _started(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    streams: Sequence[int],
    limits: Mapping[int, int] | None = None,
    code: str | None = None,
) -> ForkServerProcess:
    process = _Kvgen(arguments, dict(environment), streams, dict(limits or {}), code)
    process.start()
    return process


class _Kvgen(ForkServerProcess):
    def __init__(
        self,
        arguments: Sequence[str],
        environment: dict[str, str],
        streams: Sequence[int],
        limits: dict[int, int],
        code: str | None,
    ) -> None:
        super().__init__()
        self.arguments, self.environment, self.streams = arguments, environment, list(streams)
        self.limits, self.code = limits, code
        self.folder = Path.cwd()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "streams": [None if fd == CLOSED else DupFd(fd) for fd in self.streams]}

    def run(self) -> None:
        """In the new process: become what `python -m kvgen`, or `python -c`, is."""
        for number, stream in enumerate(self.streams):
            if stream is None:
                os.close(number)
            else:
                os.dup2(stream.detach(), number)  # type: ignore[attr-defined]
        if self.streams[0] is not None and os.isatty(0):
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.environment)
        sys.stdin = None if self.streams[0] is None else os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
        sys.argv = ["kvgen", *self.arguments]
        gc.freeze()  # else each collection would touch, and so copy, what the server has imported
        for limit, value in self.limits.items():
            resource.setrlimit(limit, (value, value))
        if self.code is not None:
            exec(compile(self.code, "<string>", "exec"), {"__name__": "__main__"})
            return

        from kvgen.__main__ import main

        main()


def _write(fd: int, text: str) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(fd, "w", newline="") as stream:
        stream.write(text)
