"""Results files: whole lines only, so that a run that was killed can be resumed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvgen.errors import KvgenError, UsageError
from kvgen.pipeline.record import Record, differences, read_record, record_path, write_record
from kvgen.pipeline.rows import InputRow
from kvgen.system import atomic_file


class Lines:
    """Writes values to a file descriptor as lines of JSON. In a regular file, a line that fails is removed again."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.is_regular = stat.S_ISREG(os.fstat(file).st_mode)  # not a pipe or a device

    def write(self, value: dict[str, Any]) -> None:
        """Write a line. Raises OSError."""
        line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        start = os.lseek(self._file, 0, os.SEEK_END) if self.is_regular else 0
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except BaseException:  # also KeyboardInterrupt
            if self.is_regular:
                os.ftruncate(self._file, start)
            raise


class ResultsFile:
    """A JSONL file of results that one process at a time appends to.

    done: digests of the rows that have a result, by index. failed: how many of the results are errors.
    record: see `run_record`; None if there is none.
    """

    def __init__(self, path: Path, *, resume: bool, retry_errors: bool = False) -> None:
        """Open or create the file, and lock it. retry_errors: remove the lines of rows that failed.

        Raises UsageError if the file has content and not `resume`, is not a results file, or is in use by another
        process, KvgenError if it cannot be written.
        """
        self.path, self._target = path, path.resolve()
        self.done: dict[int, str] = {}
        self.failed = 0
        self.record: Record | None = None
        try:
            self._open()
            if not self._lines.is_regular:
                if resume:
                    raise UsageError(f"--resume needs a file with results, and {path} is none")
                return
            self._lock = FileLock(self._target.with_name(f".{self._target.name}.lock"))
            self._lock.acquire(blocking=False)
            os.ftruncate(self._file, self._scan(resume))
            self.record = read_record(self._target) if self.done else None
            if retry_errors and self.failed:
                self._drop_errors()
        except Timeout:
            raise UsageError(f"{path}: another kvgen batch is writing to it") from None
        except OSError as error:
            raise KvgenError(f"{path}: cannot be written ({error.strerror})") from error

    def _open(self) -> None:
        # A pipe that is open for reading too would not end when its reader leaves, nor wait for one.
        access = os.O_WRONLY if self.path.is_fifo() else os.O_RDWR
        self._file = os.open(self.path, access | os.O_CREAT | os.O_APPEND, 0o666)
        self._lines = Lines(self._file)

    def _scan(self, resume: bool) -> int:
        """Fill `done` and `failed`; return the end of the last complete line."""
        end = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not resume:
                    raise UsageError(f"{self.path}: already exists; continue it with --resume, or name another file")
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    value = json.loads(line)
                    index, digest = value["index"], value["digest"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UsageError(f"{self.path}, line {number}: not a result of kvgen batch") from None
                if type(index) is not int or index in self.done:
                    raise UsageError(f"{self.path}, line {number}: the row index {index!r} is repeated or invalid")
                self.done[index] = digest
                self.failed += "error" in value
        return end

    def _drop_errors(self) -> None:
        """Replace the file, atomically, by one without the lines of rows that failed."""
        with open(self._file, "rb", closefd=False) as file, atomic_file(self._target) as copy:
            shutil.copymode(self._target, copy.name)
            file.seek(0)
            for line in file:
                value = json.loads(line)
                if "error" in value:
                    del self.done[value["index"]]
                else:
                    copy.write(line)
        self.failed = 0
        os.close(self._file)
        self._open()

    def claim(self, record: Record) -> None:
        """Check that earlier results have the same run record; write it if there are none.

        Raises UsageError if the record differs or is missing, KvgenError if it cannot be written.
        """
        if not self._lines.is_regular:
            return
        if self.done:
            if self.record is None:
                missing = f"the run record {record_path(self._target).name}, which --resume needs, is missing"
                raise UsageError(f"{self.path}: {missing}: restore it, or name another file")
            if found := differences(record, self.record):
                raise UsageError(f"{self.path}: made with other settings: {found}; use the same, or name another file")
            return
        try:
            write_record(self._target, record)
        except OSError as error:
            raise KvgenError(f"{record_path(self._target)}: cannot be written ({error.strerror})") from error

    def write(self, value: dict[str, Any]) -> None:
        """Write a line. Raises KvgenError if that fails; the file then ends with the previous line."""
        try:
            self._lines.write(value)
        except OSError as error:
            hint = "; earlier results are complete, continue with --resume" if self._lines.is_regular else ""
            raise KvgenError(f"{self.path}: cannot be written ({error.strerror}){hint}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # some files cannot be synced
            os.fsync(self._file)
        os.close(self._file)
        if self._lines.is_regular:
            self._lock.release()


class InOrder:
    """Passes results on in the order of their rows; early ones wait. done: indices without a new result."""

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
    """Yield the rows without a result. Raises UsageError if a row with a result has changed."""
    for row in rows:
        if row.index not in done:
            yield row
        elif done[row.index] != row.digest:
            raise UsageError(f"row {row.index} is not the one whose result is in {path}: has the input changed?")
