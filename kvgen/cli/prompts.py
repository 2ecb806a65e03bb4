"""Where prompts come from: an option, a file, or stdin, and stdin only when it is meant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvgen.cli.stdin import has_text
from kvgen.errors import NotFoundError, UsageError

_STDIN = Path("-")
_TOO_LONG = "longer than 64 MB, which no model's context holds"
_MOST = 64 * 1024 * 1024  # bytes of a prompt: ten million tokens of more than six bytes


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt. where: the line that it is, for messages; empty for the only one. error: why it cannot be read."""

    text: str
    where: str = ""
    error: UsageError | None = None


def read_prompts(prompt: str | None, file: Path | None, *, lines: bool) -> Iterator[GivenPrompt]:
    """The prompts that the options mean, read as they are asked for. Blank lines are none.

    Raises UsageError for options that contradict each other or an only prompt that is empty; NotFoundError for a file
    that cannot be read.
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
        return _lines(file)
    return iter([GivenPrompt(_whole(prompt, file))])


def with_piped_text(prompt: str | None, file: Path | None, notify: Callable[[str], None]) -> str | None:
    """A prompt that was given as an option, behind the text that is piped in, if there is any and nothing else says
    where text comes from. What is done is said by `notify`.
    """
    if prompt in (None, "-") or file is not None or not has_text(notify):
        return prompt
    piped = read_file(_STDIN, most=_MOST)
    if not piped:
        return prompt
    notify(f"stdin, {len(piped):,} characters, goes before the prompt (`< /dev/null` leaves it out)")
    return f"{piped}\n{prompt}"


def read_file(file: Path, *, most: int | None = None) -> str:
    """A whole file, or stdin for `-`, without its last line break. Raises as `read_prompts` does.

    most: bytes, beyond which it is refused as a prompt.
    """
    with _open(file) as source:
        data = source.read() if most is None else source.read(most + 1)
    if most is not None and len(data) > most:
        raise UsageError(f"{_name(file)}: {_TOO_LONG}")
    return _without_line_break(_decode(data, f"{_name(file)}: "))


def read_option_file(option: str, file: Path) -> str:
    """The text of the file that an option names. Raises NotFoundError, or UsageError for an empty one."""
    if file == _STDIN:
        raise UsageError(f"{option} takes a file, not stdin")
    with _open(file) as source:
        text = _decode(source.read(), f"{_name(file)}: ")
    if not text.strip():
        raise UsageError(f"{option} {file}: the file is empty")
    return text


def open_lines(file: Path | None) -> Iterator[bytes]:
    """The lines of a file, or of stdin for `-` or None, as they are asked for; the beginning of one that is too long.

    Raises UsageError if that is a terminal, NotFoundError for a file that cannot be read.
    """
    if file in (None, _STDIN):
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no rows: give a FILE, or pipe them in")
        file = _STDIN
    return _bounded(_open(file))


def _whole(prompt: str | None, file: Path | None) -> str:
    parts = []
    if file is not None:
        parts.append(read_file(file, most=_MOST))
    if prompt is not None:
        parts.append(prompt)
    text = "\n".join(part for part in parts if part)
    if not text:
        raise UsageError("the prompt is empty")
    return text


def _lines(file: Path) -> Iterator[GivenPrompt]:
    with _open(file) as source:
        for number, line in enumerate(_bounded(source), start=1):
            if not line.strip():
                continue
            where = f"{_name(file)}, line {number}"
            if len(line) > _MOST:
                yield GivenPrompt("", where, UsageError(_TOO_LONG))
                continue
            try:
                yield GivenPrompt(_without_line_break(_decode(line, "")), where)
            except UsageError as error:
                yield GivenPrompt(_without_line_break(line.decode("utf-8", "replace")), where, error)


def _bounded(source: BinaryIO) -> Iterator[bytes]:
    """Lines, of each no more than `_MOST` bytes and one, by which a line that is too long shows."""
    while line := source.readline(_MOST + 1):
        yield line
        while len(line) > _MOST and not line.endswith(b"\n"):
            line = source.readline(_MOST + 1)


def _open(file: Path) -> BinaryIO:
    if file == _STDIN:
        if sys.stdin is None:
            raise UsageError("stdin is closed: there is no prompt to read")
        # Not sys.stdin's own buffer, whose lock a thread that waits for input would hold when Python ends.
        return open(sys.stdin.fileno(), "rb", closefd=False)
    try:
        return file.open("rb")
    except OSError as error:
        raise NotFoundError(f"{file}: cannot be read ({error.strerror})") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # the mark that some editors put in front
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}not UTF-8 text (byte {error.start})") from None


def _without_line_break(text: str) -> str:
    """Shells and editors end text with a line break that is no part of the prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def _name(file: Path) -> str:
    return "stdin" if file == _STDIN else str(file)
