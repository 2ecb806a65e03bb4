"""Output of the commands: text and JSON on stdout, notes and progress bars on stderr."""

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

from kvgen.errors import KvgenError, UnsupportedError, UsageError
from kvgen.system import atomic_file

if TYPE_CHECKING:
    from rich import progress
    from rich.console import Console

    from kvgen.client.remote import RemoteModel
    from kvgen.contract import Backend
    from kvgen.hub.catalogue import Progress as ProgressCallback

T = TypeVar("T")

# C0 and C1 controls except newline and tab, line and paragraph separators, and bidirectional marks.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_controls(text: str) -> str:
    r"""Replace every character that could control a terminal with `\xNN` or `\uNNNN`."""
    return _CONTROLS.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def terminal(stream: TextIO, *, pipe_width: int | None = None) -> Console:
    """Return a Rich console for a stream. Colour depends on the stream alone, not on environment variables.

    pipe_width: columns if the stream is not a terminal; None for Rich's default.
    """
    from rich.console import Console  # here, because it takes time that commands in pipes would spend in vain

    width = None if stream.isatty() else pipe_width
    return Console(file=stream, force_terminal=stream.isatty(), width=width, highlight=False, markup=False, emoji=False)


class TextWriter:
    """Context manager that writes a completion to stdout and ends its last line.

    On a terminal, text appears token by token. A pipe gets whole lines, so that the output of programs that run at the
    same time (`xargs -P2`) does not mix. raw: do not escape control characters on a terminal.
    """

    def __init__(self, *, raw: bool) -> None:
        self._raw = raw
        self._console = terminal(sys.stdout) if sys.stdout.isatty() else None
        self._line = ""  # unfinished

    def __enter__(self) -> TextWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._line and not (kind and issubclass(kind, BrokenPipeError)):
            self.write("\n")

    def write(self, text: str) -> None:
        whole, end, rest = text.rpartition("\n")
        lines, self._line = (self._line + whole + end, rest) if end else ("", self._line + rest)
        if self._console is None:
            sys.stdout.write(lines)
        elif self._raw:
            sys.stdout.write(text)
        else:
            self._console.out(escape_controls(text), end="", highlight=False)
        sys.stdout.flush()


def write_json(value: Any) -> None:
    """Write one line of JSON to stdout. On a terminal it is ASCII without control characters."""
    if sys.stdout.isatty():
        line = json.dumps(value, allow_nan=False).replace("\x7f", "\\u007f")  # json does not escape DEL
    else:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace").decode()
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def format_bytes(count: int) -> str:
    """Format a number of bytes in decimal units, as in `1.5 GB`."""
    from rich import filesize

    return filesize.decimal(count)


def parse_bytes(text: str) -> int:
    """Parse a size such as `512MB`, in decimal units. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size: give a number and a unit, as in 512MB or 2GB")
    return int(float(match[1]) * 1000 ** ("", "k", "m", "g", "t").index(match[2].lower()))


def print_note(text: str, style: str = "dim") -> None:
    """Print a line on stderr."""
    if sys.stderr.isatty():
        from rich.text import Text

        terminal(sys.stderr).print(Text(escape_controls(text), style=style))
        return
    sys.stderr.write(f"{escape_controls(text)}\n")
    sys.stderr.flush()


def notes(*, quiet: bool) -> Callable[[str], None]:
    """Return `print_note`, or a function that does nothing."""
    return (lambda text: None) if quiet else print_note


def check_page(path: Path) -> None:
    """Check that --html can be drawn and written, before anything is computed.

    Raises KvgenError, and UnsupportedError without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("--html needs matplotlib: pip install 'kvgen[report]'")
    check_file("--html", path)


def check_file(option: str, path: Path) -> None:
    """Check that the file of an option can be written, before anything is computed. Raises KvgenError."""
    if not path.parent.is_dir():
        raise KvgenError(f"{option} {path}: there is no folder {path.parent}")
    places = [path] if path.exists() else []
    if not _is_device(path):
        places.append(path.resolve().parent)
    if path.is_dir() or not all(os.access(place, os.W_OK) for place in places):
        raise KvgenError(f"{option} {path}: cannot be written")


def write_file(option: str, path: Path, content: str) -> None:
    """Write the file of an option: whole or not at all, unless to a pipe or a device. Raises KvgenError."""
    data = escape_controls(content).encode("utf-8", "backslashreplace")
    try:
        if _is_device(path):
            path.write_bytes(data)
            return
        with atomic_file(path.resolve()) as file:
            file.write(data)
    except OSError as error:
        raise KvgenError(f"{option} {path}: cannot be written ({error.strerror})") from error


def _is_device(path: Path) -> bool:
    """Whether there is something else than a file: a pipe, a terminal, /dev/null."""
    return path.exists() and not path.is_file()


@contextmanager
def download_progress(*, quiet: bool) -> Iterator[ProgressCallback]:
    """Yield a callback for `kvgen.load`: a bar on a terminal, one line elsewhere, nothing if `quiet`."""
    from rich import progress

    with _bar(progress.TextColumn("{task.description}", markup=False), progress.DownloadColumn(), hidden=quiet) as bar:

        def show(what: str, done: int, total: int) -> None:
            if not bar.tasks:
                bar.add_task(what, total=total)
                if bar.console.is_terminal:
                    bar.start()
                elif not quiet:
                    print_note(f"downloading {what}")
            bar.update(bar.tasks[0].id, completed=done, total=total)  # the total of a repository grows

        yield show


@contextmanager
def count_progress(label: str, *, quiet: bool, delay: float = 0) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for (done, total) that shows a bar on a terminal while work is in progress.

    delay: seconds after a call with 0 during which the bar stays hidden.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress  # takes a tenth of a second

    with _bar(progress.TextColumn(label), progress.MofNCompleteColumn(), hidden=False, transient=True) as bar:
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


def with_prefill_bar(events: Iterator[T], model: Backend | RemoteModel, *, quiet: bool) -> Iterator[T]:
    """Yield a model's events; show a bar on a terminal while it reads the prompt, if that takes over a second."""
    with count_progress("reading the prompt", quiet=quiet, delay=1) as show:
        model.watch(show)
        yield from events


@contextmanager
def row_progress(total: int | None, model: Backend | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Yield a callback for the tokens of each finished row; it shows a bar and rates on a terminal.

    total: number of rows; None if unknown. model: whose long prompts are shown in place of the rates.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda tokens: None
        return
    from rich import progress

    started, done, generated = time.perf_counter(), 0, 0
    columns = progress.TextColumn("rows"), progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[rate]}")
    with _bar(*columns, hidden=False) as bar:
        task = bar.add_task("rows", total=total, rate="")
        bar.start()

        def show(tokens: int) -> None:
            nonlocal done, generated
            done, generated = done + 1, generated + tokens
            seconds = time.perf_counter() - started
            bar.update(task, completed=done, rate=f"{done / seconds:.1f} rows/s, {generated / seconds:.0f} tok/s")

        if model is not None:
            model.watch(lambda read, length: bar.update(task, rate=format_reading(read, length)))
        yield show


@contextmanager
def status(text: str, model: Backend, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show a text on a terminal while work is in progress, and how much of a long sequence the model has read.

    Yields a function that replaces the text.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    with terminal(sys.stderr).status(text) as shown:

        def show(text: str) -> None:
            shown.update(text)
            model.watch(lambda done, total: shown.update(f"{text} {format_reading(done, total)}"))

        show(text)
        yield show


def format_reading(done: int, total: int) -> str:
    """Format how much of a sequence the model has read; nothing at its end."""
    return f"(reading {total:,} tokens: {100 * done // total} %)" if done < total else ""


@contextmanager
def _bar(*columns: progress.ProgressColumn, hidden: bool, transient: bool = False) -> Iterator[progress.Progress]:
    """Yield a progress bar on stderr, which the caller starts, and stop it at the end. columns: label, count, rates."""
    from kvgen.cli.bars import Bar

    bar = Bar(*columns, console=terminal(sys.stderr), transient=transient, disable=hidden)
    try:
        yield bar
    finally:
        if bar.live.is_started:
            bar.stop()
