"""Ctrl-C is not lost, wherever in Python it comes."""

from __future__ import annotations

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
