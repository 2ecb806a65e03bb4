"""stderr, on which everything for eyes goes: whatever becomes of it, it costs nothing that goes to stdout."""

from __future__ import annotations

import contextlib
import io
import os
import sys


class _Forgiving(io.TextIOWrapper):
    """Drops what cannot be written: the reader has left, or the disk is full."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def prepare_stderr() -> None:
    """A stderr that is always there and never raises.

    A closed one is opened onto nothing, or the next file that is opened would take its number, and the notes.
    """
    if sys.stderr is None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        if nothing != 2:
            os.close(nothing)
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    raw = io.FileIO(2, "w", closefd=False)  # no buffer: what is left in one would fail once more at exit
    sys.stderr = _Forgiving(raw, encoding=encoding, errors="backslashreplace", write_through=True)
