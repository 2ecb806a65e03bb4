"""What the commands put on the two streams. stdout carries text or JSON; all that is for eyes goes to stderr."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from kvgen.cli.escape import escape_controls
from kvgen.errors import KvgenError, UnsupportedError, UsageError
from kvgen.hub.catalogue import Progress as ProgressCallback

if TYPE_CHECKING:
    from kvgen.contract import Backend

T = TypeVar("T")


def terminal(stream: TextIO, *, pipe_width: int | None = None) -> Console:
    """A Rich console on a stream. Whether that is a terminal the stream says, not an environment variable.

    pipe_width: columns where it is none; None for Rich's own choice.
    """
    width = None if stream.isatty() else pipe_width
    return Console(file=stream, force_terminal=stream.isatty(), width=width, highlight=False, markup=False, emoji=False)


class TextWriter:
    """Writes a completion to stdout: through Rich on a terminal, token by token; untouched into a pipe, in whole lines,
    so that those of programs that write at the same time (`xargs -P2`) do not mix.

    A context: on leaving it, however that happens, all of the text is there and its line is ended.
    """

    def __init__(self, *, raw: bool) -> None:
        self._raw = raw
        self._console = terminal(sys.stdout)
        self._line = ""  # that is not ended

    def __enter__(self) -> TextWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._line and not (kind and issubclass(kind, BrokenPipeError)):
            self.write("\n")

    def write(self, text: str) -> None:
        whole, end, rest = text.rpartition("\n")
        lines, self._line = (self._line + whole + end, rest) if end else ("", self._line + rest)
        if not self._console.is_terminal:
            sys.stdout.write(lines)
        elif self._raw:
            sys.stdout.write(text)
        else:
            self._console.out(escape_controls(text), end="", highlight=False)
        sys.stdout.flush()


def write_json(value: Any) -> None:
    """One line of JSON on stdout. On a terminal it is plain ASCII, so nothing in it can steer the terminal."""
    on_terminal = sys.stdout.isatty()
    line = json.dumps(value, ensure_ascii=on_terminal, allow_nan=False)
    line = escape_json_delete(line) if on_terminal else line.encode(errors="backslashreplace").decode()
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def escape_json_delete(line: str) -> str:
    """DEL is the one control character that JSON does not escape."""
    return line.replace("\x7f", "\\u007f")


def format_bytes(count: int) -> str:
    """Bytes in the decimal units of file managers."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def parse_bytes(text: str) -> int:
    """`512MB` as a number, in the units of `format_bytes`. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is no size: give a number and a unit, as in 512MB or 2GB")
    return int(float(match[1]) * 1000 ** ("", "k", "m", "g", "t").index(match[2].lower()))


def print_note(text: str, style: str = "dim") -> None:
    """A line on stderr."""
    if sys.stderr.isatty():
        terminal(sys.stderr).print(Text(escape_controls(text), style=style))
        return
    sys.stderr.write(f"{escape_controls(text)}\n")
    sys.stderr.flush()


def notes(*, quiet: bool) -> Callable[[str], None]:
    """`print_note`, or nothing."""
    return (lambda text: None) if quiet else print_note


@contextmanager
def download_progress(*, quiet: bool) -> Iterator[ProgressCallback]:
    """A callback for `kvgen.load` that shows a bar on a terminal, a line elsewhere, nothing if `quiet`."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), DownloadColumn()
    with _stopped_at_the_end(Progress(*columns, TimeRemainingColumn(), console=terminal(sys.stderr))) as bar:

        def show(what: str, done: int, total: int) -> None:
            if quiet:
                return
            if not bar.tasks:
                bar.add_task(what, total=total)
                if bar.console.is_terminal:
                    bar.start()
                else:
                    print_note(f"fetching {what}")
            bar.update(bar.tasks[0].id, completed=done, total=total)  # of a repository, the total grows

        yield show


def check_page(path: Path) -> None:
    """Refuse an --html that could not be drawn or written, before anything is computed.

    Raises KvgenError, and UnsupportedError without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("--html draws with matplotlib: pip install 'kvgen[report]'")
    if not path.parent.is_dir():
        raise KvgenError(f"--html {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise KvgenError(f"--html {path}: cannot be written")


def write_page(path: Path, page: str) -> None:
    """Write what --html names. Raises KvgenError if that cannot be."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise KvgenError(f"--html {path}: cannot be written ({error.strerror})") from error


@contextmanager
def count_progress(label: str, *, quiet: bool, delay: float = 0) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal for what is done, of how much; it shows while something is done and something left.

    delay: for so many seconds from 0 on it does not show.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = TextColumn(label), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
    with _stopped_at_the_end(Progress(*columns, console=terminal(sys.stderr), transient=True)) as bar:
        task, began = bar.add_task(label, total=None), time.perf_counter()

        def show(done: int, total: int) -> None:
            nonlocal began
            if done == 0:
                began = time.perf_counter()
                bar.reset(task)
            bar.update(task, completed=done, total=total)
            if 0 < done < total and time.perf_counter() - began >= delay:
                bar.start()
            if done >= total and bar.live.is_started:
                bar.stop()

        yield show


def with_prefill_bar(events: Iterator[T], model: Backend, *, quiet: bool) -> Iterator[T]:
    """What comes of a model; until then a bar on a terminal, if reading the prompt takes longer than a second."""
    with count_progress("reading the prompt", quiet=quiet, delay=1) as show:
        model.watch(show)
        yield from events


@contextmanager
def row_progress(total: int | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal for rows that are done, with their rate. Called with the tokens of each row.

    total: how many rows there are; None if that is not known.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda tokens: None
        return
    columns = TextColumn("rows"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    started, done, generated = time.perf_counter(), 0, 0
    with _stopped_at_the_end(Progress(*columns, TimeRemainingColumn(), console=terminal(sys.stderr))) as bar:
        task = bar.add_task("rows", total=total, rate="")
        bar.start()

        def show(tokens: int) -> None:
            nonlocal done, generated
            done, generated = done + 1, generated + tokens
            seconds = time.perf_counter() - started
            bar.update(task, completed=done, rate=f"{done / seconds:.1f} rows/s, {generated / seconds:.0f} tok/s")

        yield show


@contextmanager
def _stopped_at_the_end(bar: Progress) -> Iterator[Progress]:
    """A bar that starts when there is something to show, if ever."""
    try:
        yield bar
    finally:
        if bar.live.is_started:
            bar.stop()
