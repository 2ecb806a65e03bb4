"""`kvgen batch --ray`: the same rows and the same results, from two workers, of which one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.program import KVGEN, run
from tests.test_pipeline import results_of, write_rows

pytest.importorskip("ray", reason="Ray is an extra")
pytestmark = pytest.mark.slow


def workers_of(parent: int) -> list[int]:
    """The processes that hold a model."""
    found = subprocess.run(["pgrep", "-f", "ray::.*Map.*"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_two_workers_give_what_one_process_gives_though_one_is_killed(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    rows, out = write_rows(tmp_path / "rows", 1500), tmp_path / "out"
    command = ["batch", "-m", str(folder), "-t", "1", "-n", "40", "--seed", "1", str(rows)]
    alone = run(*command)
    process = subprocess.Popen(
        [*KVGEN, *command, "--ray", "--ray-workers", "2", "-o", str(out), "--resume"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, killed = time.monotonic() + 200, False
    while time.monotonic() < deadline and process.poll() is None and not killed:
        if out.exists() and out.read_bytes().count(b"\n") > 60:
            workers = workers_of(process.pid)
            if len(workers) >= 2:
                os.kill(workers[0], signal.SIGKILL)
                killed = True
    printed, errors = process.communicate(timeout=300)
    assert killed
    assert (process.returncode, printed) == (0, ""), errors
    assert set(errors.splitlines()) == {"a worker died; its rows are repeated"}
    assert out.read_text() == alone.stdout
    assert [value["index"] for value in results_of(out.read_text())] == list(range(1500))


def test_a_cluster_that_is_not_there_is_one_line(tiny_llama) -> None:
    folder, _ = tiny_llama()
    found = run("batch", "-m", str(folder), "--ray=127.0.0.1:1", input=json.dumps("x") + "\n")
    assert found.returncode == 1
    assert found.stdout == ""
    assert "cannot be reached" in found.stderr
