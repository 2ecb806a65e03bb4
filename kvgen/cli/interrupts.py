"""Ctrl-C: what it does in a command, and that none is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN = 0.01  # seconds


def raise_interrupts() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, wherever it comes; see `kvgen.__main__` for what it is before.

    Python drops one that it raises in a destructor or a callback of a weak reference. Such a one is raised again a
    moment later.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = _raise_again


def _raise_again(dropped: Any) -> None:
    """What Python calls with an exception that it drops."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        threading.Timer(_AGAIN, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


@contextmanager
def ending_softly(*, quiet: bool) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether to begin more work: no after one Ctrl-C. The next is a KeyboardInterrupt."""
    interrupted = False

    def handle(number: int, frame: types.FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        if not quiet:  # not print_note: a handler may come in the middle of another write
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), b"\nending the rows under way; Ctrl-C again to stop at once\n")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: not interrupted
    finally:
        signal.signal(signal.SIGINT, before)
