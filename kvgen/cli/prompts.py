"""Read prompts from options, files and stdin."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvgen.errors import NotFoundError, UsageError

_STDIN = Path("-")
_TOO_LONG = "longer than 64 MB, more than any model's context holds"
_MAX_BYTES = 64 * 1024 * 1024  # about ten million tokens
_TIMEOUT = 10.0  # seconds that a pipe may stay silent; enough to load another model at its other end
_QUIET_WAIT = 1.0  # seconds of the timeout before a note explains the wait


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt. where: its file and line, for messages; empty for a single prompt. error: why it cannot be read."""

    text: str
    where: str = ""
    error: UsageError | None = None


def read_prompts(prompt: str | None, file: Path | None, *, lines: bool) -> Iterator[GivenPrompt]:
    """Read the prompts that --prompt, --prompt-file and --lines name, lazily. Blank lines are skipped.

    Raises UsageError for contradicting options or an empty single prompt, NotFoundError for a file that cannot be read.
    """
    if prompt == "-":
        if file is not None:
            raise UsageError("--prompt - reads stdin; leave --prompt-file out")
        prompt, file = None, _STDIN
    if prompt is None and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe text in")
        file = _STDIN
    if lines:
        if prompt is not None or file is None:
            raise UsageError("--lines takes the prompts from --prompt-file or stdin; leave --prompt out")
        return _read_lines(file)
    parts = ["" if file is None else read_file(file, max_bytes=_MAX_BYTES), prompt]
    text = "\n".join(part for part in parts if part)
    if not text:
        raise UsageError("the prompt is empty")
    return iter([GivenPrompt(text)])


def with_piped_text(prompt: str | None, file: Path | None, notify: Callable[[str], None]) -> str | None:
    """Put piped text before a prompt, if no option names stdin or a file. Calls `notify` with what it does."""
    if prompt in (None, "-") or file is not None or not has_piped_text(notify):
        return prompt
    piped = read_file(_STDIN, max_bytes=_MAX_BYTES)
    if not piped:
        return prompt
    notify(f"stdin, {len(piped):,} characters, goes before the prompt (`< /dev/null` leaves it out)")
    return f"{piped}\n{prompt}"


def has_piped_text(notify: Callable[[str], None], timeout: float = _TIMEOUT) -> bool:
    """Return whether stdin is a pipe that has data or is closed, or a file at its start.

    Programs inherit a stdin that is not meant for them: the file of a shell loop, or the pipe of a parent that never
    writes. timeout: seconds to wait for a silent pipe.
    """
    if sys.stdin is None:
        return False
    descriptor = sys.stdin.fileno()
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        if 0 < position < status.st_size:  # `while read line; do ...; done < file`
            notify("ignoring stdin, a file that another program is reading; -f - reads the rest of it")
        return position == 0
    if not (stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
        return False  # a terminal or /dev/null

    def is_ready(seconds: float) -> bool:
        return bool(select.select([descriptor], [], [], max(0, seconds))[0])

    if is_ready(min(_QUIET_WAIT, timeout)):
        return True
    notify("waiting for stdin, an empty pipe (`< /dev/null` leaves it out)")
    if is_ready(timeout - _QUIET_WAIT):
        return True
    notify(f"ignoring stdin, which stayed silent for {timeout:g} s (`-f -` waits for it)")
    return False


def read_file(file: Path, *, max_bytes: int | None = None) -> str:
    """Read a file, or stdin for `-`, without its last line break. Raises UsageError and NotFoundError."""
    with _open(file) as source:
        data = source.read() if max_bytes is None else source.read(max_bytes + 1)
    if max_bytes is not None and len(data) > max_bytes:
        raise UsageError(f"{_name(file)}: {_TOO_LONG}")
    return _strip_line_break(_decode(data, f"{_name(file)}: "))


def read_option_file(option: str, file: Path) -> str:
    """Read the file that an option names. Raises NotFoundError, and UsageError if it is empty."""
    if file == _STDIN:
        raise UsageError(f"{option} takes a file, not stdin")
    with _open(file) as source:
        text = _decode(source.read(), f"{file}: ")
    if not text.strip():
        raise UsageError(f"{option} {file}: the file is empty")
    return text


def open_lines(file: Path | None) -> Iterator[bytes]:
    """Read the lines of a file, or of stdin for `-` or None, lazily. Lines over 64 MB are cut.

    Raises UsageError if stdin is a terminal, NotFoundError for a file that cannot be read.
    """
    if file in (None, _STDIN):
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no rows: give a FILE, or pipe them in")
        file = _STDIN
    return _bounded_lines(_open(file))


def _read_lines(file: Path) -> Iterator[GivenPrompt]:
    with _open(file) as source:
        for number, line in enumerate(_bounded_lines(source), start=1):
            if not line.strip():
                continue
            where = f"{_name(file)}, line {number}"
            if len(line) > _MAX_BYTES:
                yield GivenPrompt("", where, UsageError(_TOO_LONG))
                continue
            try:
                yield GivenPrompt(_strip_line_break(_decode(line, "")), where)
            except UsageError as error:
                yield GivenPrompt(_strip_line_break(line.decode("utf-8", "replace")), where, error)


def _bounded_lines(source: BinaryIO) -> Iterator[bytes]:
    """Yield lines, cut to `_MAX_BYTES` + 1 bytes so that the caller can tell which are too long."""
    while line := source.readline(_MAX_BYTES + 1):
        yield line
        while len(line) > _MAX_BYTES and not line.endswith(b"\n"):
            line = source.readline(_MAX_BYTES + 1)


def _open(file: Path) -> BinaryIO:
    if file == _STDIN:
        if sys.stdin is None:
            raise UsageError("stdin is closed: there is no prompt to read")
        # Not sys.stdin.buffer: a thread that waits for input would hold its lock when Python ends.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    try:
        return file.open("rb")
    except OSError as error:
        raise NotFoundError(f"{file}: cannot be read ({error.strerror})") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # byte order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}not UTF-8 text (byte {error.start})") from None


def _strip_line_break(text: str) -> str:
    """Remove the last line break, which shells and editors add."""
    return text.removesuffix("\n").removesuffix("\r")


def _name(file: Path) -> str:
    return "stdin" if file == _STDIN else str(file)
