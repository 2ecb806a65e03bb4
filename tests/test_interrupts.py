"""Ctrl-C is not lost, wherever in Python it comes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

_PROGRAM = """
import signal, sys, threading
from kvgen.cli.interrupts import {ending}raise_interrupts

class Ends:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(100):  # somewhere here Python raises it, and drops it
            pass

raise_interrupts()
try:
    {before}
        Ends()
        threading.Event().wait(60)
except KeyboardInterrupt:
    print("interrupted")
"""
_SOFTLY = "with ending_softly(quiet=True):\n        signal.raise_signal(signal.SIGINT)"


def _ends_with(ending: str, before: str) -> subprocess.CompletedProcess[str]:
    program = _PROGRAM.format(ending=ending, before=before)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)


def test_one_that_python_drops_comes_again() -> None:
    ended = _ends_with("", "if True:")
    assert (ended.stdout, ended.stderr) == ("interrupted\n", "")


def test_nor_is_the_second_of_two_lost() -> None:
    ended = _ends_with("ending_softly, ", _SOFTLY)
    assert (ended.stdout, ended.stderr) == ("interrupted\n", "")


def test_sigterm_shows_the_cursor_that_a_progress_bar_hides() -> None:
    terminal, theirs = pty.openpty()
    program = (
        "import signal; from kvgen.cli.interrupts import raise_interrupts; raise_interrupts(); "
        "signal.raise_signal(signal.SIGTERM)"
    )
    environment = {**os.environ, "TERM": "xterm"}
    ended = subprocess.run([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment, timeout=30)
    assert ended.returncode == -signal.SIGTERM
    os.set_blocking(terminal, False)
    assert b"\x1b[?25h" in os.read(terminal, 1000)
