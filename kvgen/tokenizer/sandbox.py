"""Run a chat template in a worker process, with limits on time, memory and output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvgen.errors import CheckpointError, KvgenError, UsageError

MAX_SECONDS = 5.0
MAX_CHARACTERS = 10_000_000  # of the rendered text
MAX_MEMORY = 1 << 30  # bytes of the worker's address space
_MAX_SOURCE = 1_000_000  # characters of the template
_MAX_START_SECONDS = 60.0
_BYTES_PER_CHARACTER = 6  # at most, in JSON: \u0000
_WORKER = Path(__file__).with_name("sandbox_worker.py")
_ENVIRONMENT = ("TZ", "TZDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")  # the local time, and what Python needs to start


class Sandbox:
    """A chat template in a worker process, which starts at the first rendering and is replaced if it ends.

    The worker runs jinja2's immutable sandbox and is killed when its time is up. Threads take turns; a forked child
    starts its own worker. Collecting this object, or leaving the interpreter, ends the worker.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Sandbox] | None = None
        _sandboxes.add(self)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render the template. `variables` must fit into JSON.

        Raises UsageError if the template calls `raise_exception`, CheckpointError if it fails or exceeds a limit.
        """
        if len(self._source) > _MAX_SOURCE:
            raise _failure(f"it is longer than {_MAX_SOURCE} characters")
        with self._lock:
            try:
                answer = self._exchange(self._running_worker(), variables, MAX_SECONDS)
            except BaseException:  # a late answer would be read as the next one
                self._stop()
                raise
        if "refused" in answer:
            raise UsageError(f"the chat template refuses this conversation: {answer['refused']}")
        if "error" in answer:
            raise _failure(answer["error"])
        return answer["text"]

    def _running_worker(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        specs = [find_spec("jinja2"), find_spec("markupsafe")]
        packages = {str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WORKER), *packages],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C in the terminal is the parent's
            )
        except OSError as error:
            raise KvgenError(f"the process for the chat template cannot start ({error.strerror})") from error
        self._finalizer = weakref.finalize(self, _kill, self._process)
        settings = {
            "source": self._source,
            "max_seconds": MAX_SECONDS,
            "max_characters": MAX_CHARACTERS,
            "max_memory": MAX_MEMORY,
        }
        self._exchange(self._process, settings, _MAX_START_SECONDS)
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], message: Mapping[str, Any], seconds: float) -> dict[str, str]:
        """Send one line and read one. Killing the worker unblocks both."""
        assert process.stdin is not None and process.stdout is not None
        request, answer = memoryview(_encode(message)), bytearray()
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        start = time.monotonic()
        timer.start()
        try:
            while request:
                request = request[process.stdin.write(request) :]
            while not answer.endswith(b"\n") and len(answer) <= _BYTES_PER_CHARACTER * MAX_CHARACTERS + 100:
                chunk = process.stdout.read(1 << 16)
                if not chunk:
                    break
                answer += chunk
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        if time.monotonic() - start >= seconds:
            raise _failure(f"it takes longer than {seconds:g} seconds")
        if not answer.endswith(b"\n"):
            raise _failure("its process ended without an answer")
        answered: dict[str, str] = json.loads(answer)
        return answered

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()

    def _leave_to_parent(self) -> None:
        """Forget the worker in a forked child: it belongs to the process that started it."""
        self._lock = threading.Lock()
        if self._process is not None and self._finalizer is not None and self._finalizer.detach():
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # it cannot be waited for; without this, Popen warns that it still runs
        self._process = None


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _failure(reason: str) -> CheckpointError:
    return CheckpointError(f"the chat template fails ({reason})")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with process:  # closes the pipes and waits
        process.kill()


def _leave_workers_to_parent() -> None:
    for sandbox in list(_sandboxes):
        sandbox._leave_to_parent()


_sandboxes: weakref.WeakSet[Sandbox] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_workers_to_parent)
