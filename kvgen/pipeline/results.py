"""Where results go: line by line, whole or not at all, so that a run that was killed can be gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvgen.errors import KvgenError, UsageError
from kvgen.pipeline.record import Record, differences, read_record, record_path, write_record
from kvgen.pipeline.rows import InputRow


class Lines:
    """Writes values to a file descriptor, a line of JSON each. A line that cannot be written whole is taken back, where
    the file lets itself be cut.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self.can_cut = stat.S_ISREG(os.fstat(file).st_mode)  # not a pipe or a device

    def write(self, value: dict[str, Any]) -> None:
        """Add a line. Raises OSError."""
        line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        start = os.lseek(self._file, 0, os.SEEK_END) if self.can_cut else 0
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except BaseException:  # an interruption too
            if self.can_cut:
                os.ftruncate(self._file, start)
            raise


class ResultsFile:
    """A JSONL file of results, to which lines are added, by one process at a time.

    done: the digests of the rows whose results are in it, by their index. failed: how many of them are errors.
    record: how they were made; None if that is not known.
    """

    def __init__(self, path: Path, *, resume: bool, retry_errors: bool = False) -> None:
        """retry_errors: drop the lines of rows that failed.

        Raises UsageError for a file that holds results already, unless `resume`, or something else, or that another
        process writes to, KvgenError for one that cannot be written.
        """
        self.path = path
        self.done: dict[int, str] = {}
        self.failed = 0
        self.record: Record | None = None
        try:
            self._open()
            if not self._lines.can_cut:
                return
            target = path.resolve()
            self._lock = FileLock(target.with_name(f".{target.name}.lock"))
            self._lock.acquire(blocking=False)
            os.ftruncate(self._file, self._whole_lines(resume))
            self.record = read_record(path) if self.done else None
            if retry_errors and self.failed:
                self._drop_errors()
        except Timeout:
            raise UsageError(f"{path}: another kvgen batch is writing to it") from None
        except OSError as error:
            raise KvgenError(f"{path}: cannot be written ({error.strerror})") from error

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._lines = Lines(self._file)

    def _whole_lines(self, resume: bool) -> int:
        """Where the last whole line ends; what is behind it was torn."""
        end = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not resume:
                    raise UsageError(f"{self.path}: exists; --resume goes on with it, or name another file")
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    value = json.loads(line)
                    index, digest = value["index"], value["digest"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UsageError(f"{self.path}, line {number}: not a result of kvgen batch") from None
                if type(index) is not int or index in self.done:
                    raise UsageError(f"{self.path}, line {number}: the row {index!r} is there twice or is none")
                self.done[index] = digest
                self.failed += "error" in value
        return end

    def _drop_errors(self) -> None:
        """Write the file anew without the lines of rows that failed, at once: until then it is as it was."""
        target = self.path.resolve()
        with tempfile.TemporaryDirectory(prefix=".kvgen-", dir=target.parent) as folder:
            kept = Path(folder) / target.name
            with open(self._file, "rb", closefd=False) as file, kept.open("wb") as copy:
                file.seek(0)
                for line in file:
                    value = json.loads(line)
                    if "error" in value:
                        del self.done[value["index"]]
                    else:
                        copy.write(line)
                copy.flush()
                os.fsync(copy.fileno())
            shutil.copymode(target, kept)
            kept.replace(target)
        self.failed = 0
        os.close(self._file)
        self._open()

    def claim(self, record: Record) -> None:
        """Say how the results to come are made. Raises UsageError if those that are there were made otherwise, or if
        nothing says how, KvgenError if the record cannot be written.
        """
        if not self._lines.can_cut:
            return
        if self.done:
            if self.record is None:
                raise UsageError(
                    f"{self.path}: {record_path(self.path).name} is not beside it, so nothing says with what model and "
                    "settings to go on: put it there, or name another file"
                )
            found = differences(record, self.record)
            if found:
                raise UsageError(f"{self.path}: made otherwise: {found}; go on alike, or name another file")
            return
        try:
            write_record(self.path, record)
        except OSError as error:
            raise KvgenError(f"{record_path(self.path)}: cannot be written ({error.strerror})") from error

    def write(self, value: dict[str, Any]) -> None:
        """Add a line. Raises KvgenError if it cannot be written whole; the file then ends before it."""
        try:
            self._lines.write(value)
        except OSError as error:
            raise KvgenError(
                f"{self.path}: cannot be written ({error.strerror}); all before is there: go on with --resume"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # not every file can be synchronized
            os.fsync(self._file)
        os.close(self._file)
        if self._lines.can_cut:
            self._lock.release()


class InOrder:
    """Passes results on in the order of their rows; those that come early wait.

    done: indices that nothing will come for.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None], done: dict[int, str]) -> None:
        self._write, self._done = write, done
        self._next = 0
        self._held: dict[int, dict[str, Any]] = {}

    def __call__(self, value: dict[str, Any]) -> None:
        self._held[value["index"]] = value
        while self._next in self._done or self._next in self._held:
            held = self._held.pop(self._next, None)
            if held is not None:
                self._write(held)
            self._next += 1


def not_done(rows: Iterator[InputRow], done: dict[int, str], path: Path | None) -> Iterator[InputRow]:
    """The rows that are not in a results file yet. Raises UsageError if those that are have changed since."""
    for row in rows:
        if row.index not in done:
            yield row
        elif done[row.index] != row.digest:
            raise UsageError(f"row {row.index} is not the one whose result is in {path}: is it another input?")
