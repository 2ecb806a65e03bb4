"""Text that is piped in beside a prompt: taken when it comes, and not waited for where it never may.

Programs inherit a stdin that nobody meant for them: the file of a shell's loop, the pipe of a parent that never writes.
What is done with it is always said.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable

PATIENCE = 10.0  # seconds that a pipe may stay silent; enough for another model to be loaded at its other end
_UNREMARKED = 1.0  # of those, the seconds before the wait is explained


def has_text(notify: Callable[[str], None], patience: float = PATIENCE) -> bool:
    """Whether stdin holds text that goes with a prompt: a pipe with content, or a file that nobody has begun to read.

    A pipe that stays open and silent is not waited for longer than `patience` seconds.
    """
    if sys.stdin is None:
        return False
    descriptor = sys.stdin.fileno()
    kind = os.fstat(descriptor)
    if stat.S_ISREG(kind.st_mode):
        return _is_at_its_start(descriptor, kind.st_size, notify)
    if stat.S_ISFIFO(kind.st_mode) or stat.S_ISSOCK(kind.st_mode):
        return _speaks(descriptor, notify, patience)
    return False  # a terminal, /dev/null


def _is_at_its_start(descriptor: int, size: int, notify: Callable[[str], None]) -> bool:
    """Whether a file is there to be read. In `while read line; do ...; done < file`, it belongs to the loop."""
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    if 0 < position < size:
        notify("stdin, a file that is read by something else as well, is left alone; -f - reads the rest of it")
    return position == 0


def _speaks(descriptor: int, notify: Callable[[str], None], patience: float) -> bool:
    """Whether something comes through a pipe, be it only its end, while patience lasts."""
    if _is_ready(descriptor, min(_UNREMARKED, patience)):
        return True
    notify("waiting for stdin, a pipe with nothing in it yet (`< /dev/null` leaves it out)")
    if _is_ready(descriptor, patience - _UNREMARKED):
        return True
    notify(f"stdin stays silent after {patience:g} s: the prompt goes without it (`-f -` waits for it)")
    return False


def _is_ready(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], max(0, seconds))[0])
