"""Handling of Ctrl-C, and of SIGTERM on a terminal."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from kvgen.cli.render import terminal

_RETRY_DELAY = 0.01  # seconds


def raise_interrupts() -> None:
    """Make Ctrl-C raise KeyboardInterrupt; see `kvgen.__main__` for what it does before.

    Python drops an exception raised in a destructor or a weak-reference callback. A dropped KeyboardInterrupt is raised
    again a moment later. SIGTERM ends the program as ever, but shows the cursor again, which progress bars hide.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = _raise_again
    if _on_terminals():
        signal.signal(signal.SIGTERM, _end)


def _on_terminals() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]


def _end(number: int, frame: types.FrameType | None) -> None:
    try:
        for stream in _on_terminals():
            terminal(stream).show_cursor()
    finally:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _raise_again(dropped: Any) -> None:
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        threading.Timer(_RETRY_DELAY, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


def exit_now(code: int) -> NoReturn:
    """Exit without taking Python down, which takes most of a second with torch, and aborts where a thread computes."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))
    atexit._run_exitfuncs()
    os._exit(code)


@contextmanager
def ending_softly(*, quiet: bool) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns False after one Ctrl-C. A second Ctrl-C raises KeyboardInterrupt."""
    interrupted = False

    def handle(number: int, frame: types.FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        if not quiet:  # os.write, because the handler may interrupt another write to stderr
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), b"\nfinishing the rows in progress; press Ctrl-C again to stop now\n")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: not interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
