"""Ctrl-C is not lost, wherever in Python it comes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.program import KVGEN

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


def test_an_interrupted_program_waits_for_no_thread_and_runs_what_is_to_run_at_its_end() -> None:
    program = (
        "import atexit, threading; from kvgen.cli.interrupts import exit_now; "
        "atexit.register(print, 'at exit', flush=True); threading.Thread(target=threading.Event().wait).start(); "
        "exit_now(130)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "at exit\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["cpp", "off"])
def test_ctrl_c_in_the_middle_of_a_pass_is_answered_soon(smollm2_path: Path, tmp_path: Path, kernels: str) -> None:
    """On one thread, in seconds of its own time, since the machine may be busy; a pass takes several."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the city of Nova Haven was a thriving metropolis with towering skyscrapers " * 600)
    arguments = ["generate", "-m", str(smollm2_path), "-f", str(prompt), "-n", "4", "--kernels", kernels]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*KVGEN, *arguments], stderr=subprocess.PIPE, env=environment) as process:
        spent = psutil.Process(process.pid).cpu_times
        while sum(spent()[:2]) < 9:  # the third pass or a later one
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        before = sum(spent()[:2])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (130, b"")
        assert usage.ru_utime + usage.ru_stime - before < 0.6
