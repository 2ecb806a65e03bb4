"""Exit codes: every error becomes one line on stderr, and output streams may close or fill up at any time."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from typer import Exit

from kvgen.cli.render import escape_controls
from kvgen.errors import KvgenError

EXIT_INTERRUPTED = 130
_UNWRITABLE = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.EBADF)  # full, lost, or open to read only


def print_error(message: str) -> None:
    one_line = " ".join(message.split())
    typer.echo(f"kvgen: error: {escape_controls(one_line)}", err=True)


@contextmanager
def exiting_with(code: int) -> Iterator[None]:
    """Exit with `code` after the body, even if the reader of stdout leaves early (`| head -1`)."""
    with exit_codes(code):
        yield
    raise Exit(code)


@contextmanager
def exit_codes(reader_left: int = 0, *, show_traceback: bool = False) -> Iterator[None]:
    """Turn errors into one line and an exit code.

    reader_left: exit code if the reader of stdout leaves early. show_traceback: print the traceback before the line.
    """
    try:
        yield
    except KvgenError as error:
        if show_traceback:
            _print_traceback(error.__cause__ or error)
        print_error(str(error))
        raise Exit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):  # Abort: a question was not answered
        raise Exit(EXIT_INTERRUPTED) from None
    except (BrokenPipeError, SystemExit) as error:
        # Rich and Typer turn a broken pipe into an exit with code 1.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _discard_stdout()
        raise Exit(reader_left) from None
    except OSError as error:
        if error.filename is not None:  # a folder that may not be searched, a name that is too long
            if show_traceback:
                _print_traceback(error)
            print_error(f"{error.filename}: cannot be used ({error.strerror})")
            raise Exit(1) from None
        if error.errno not in _UNWRITABLE:
            raise
        _discard_stdout()
        print_error(f"stdout cannot be written ({error.strerror})")
        raise Exit(1) from None


def _print_traceback(error: BaseException) -> None:
    typer.echo(escape_controls("".join(traceback.format_exception(error))), err=True)


def prepare_stdout() -> None:
    """Write UTF-8 to files and pipes whatever the locale; on a terminal, escape what its encoding lacks.

    File names that are not UTF-8 reach files and pipes as they are.
    """
    if sys.stdout is None:
        _occupy(1)
        sys.stdout = _ClosedWriter()
    if isinstance(sys.stdout, io.TextIOWrapper):
        if sys.stdout.isatty():
            sys.stdout.reconfigure(errors="backslashreplace")
        else:
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


class _ClosedWriter(io.TextIOBase):
    """A closed stdout, which is an error only for what writes to it."""

    def write(self, text: str, /) -> int:
        raise KvgenError("stdout is closed: there is nowhere to write to")


def _occupy(descriptor: int) -> None:
    """Open /dev/null as a closed descriptor; else the next file to be opened gets it, and what is written to it."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)


def _discard_stdout() -> None:
    """Redirect stdout to /dev/null, because Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _LossyWriter(io.TextIOWrapper):
    """Drop text that cannot be written because the reader has left or the disk is full."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def prepare_stderr() -> None:
    """Make sure that stderr exists and never raises, so that notes cannot stop the output."""
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    if sys.stderr is None:
        _occupy(2)
    raw = io.FileIO(2, "w", closefd=False)  # unbuffered: a buffer would be flushed, and fail, once more at exit
    sys.stderr = _LossyWriter(raw, encoding=encoding, errors="backslashreplace", write_through=True)
