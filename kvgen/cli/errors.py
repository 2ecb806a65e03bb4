"""How errors and interruptions reach the user: one line on stderr and an exit code. Never a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer import Exit
from typer.exceptions import TyperException

from kvgen.cli.escape import escape_controls
from kvgen.cli.help import HelpfulGroup
from kvgen.cli.hints import hint
from kvgen.cli.stderr import prepare_stderr
from kvgen.errors import KvgenError

EXIT_INTERRUPTED = 130
# Options with an optional value, which Typer does not have.
_OPTIONAL_VALUES = {"--verify-cache": "--verify-cache=1", "--ray": "--ray=here"}


class Group(HelpfulGroup):
    """A command group whose commands may raise KvgenError, be interrupted, or lose their reader."""

    def main(self, *args: Any, **options: Any) -> Any:
        prepare_stderr()
        given = [_OPTIONAL_VALUES.get(word, word) for word in sys.argv[1:]]
        try:
            with _exit_codes():
                _prepare_stdout()
                code = super().main(given, *args, **{**options, "standalone_mode": False})
        except TyperException as error:  # the command line itself could not be understood
            print_error(_explain(error))
            code = error.exit_code
        except Exit as exit_:
            code = exit_.exit_code
        sys.exit(_flushed(code if isinstance(code, int) else 0))

    def invoke(self, ctx: Any) -> Any:
        with _exit_codes(show_traceback=bool(ctx.find_root().params.get("traceback"))):
            return super().invoke(ctx)


def _explain(error: TyperException) -> str:
    """What is wrong with a command line, and where to look."""
    context = getattr(error, "ctx", None)
    if context is None:
        return error.format_message()
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):  # one that the command does not have
        known = {name for parameter in context.command.params for name in parameter.opts}
        found = hint(option, context.command_path, known)
        if found is not None:
            return f"no option {option}: {found}"
    return f"{error.format_message()}{_origin(error, context)} (see '{context.command_path} --help')"


def _origin(error: TyperException, context: Any) -> str:
    """Where a wrong value comes from, if it was not typed."""
    name = getattr(getattr(error, "param", None), "name", None)
    source = name and context.get_parameter_source(name)
    if source is None or source.name != "DEFAULT_MAP":
        return ""
    chosen = [s.source for s in context.obj["settings"] if s.name == name and s.command in ("", context.info_name)]
    return f", in {chosen[-1]}"


def _prepare_stdout() -> None:
    """Text goes out as UTF-8, whatever the locale; on a terminal of another encoding, escaped where it must be."""
    if sys.stdout is None:
        raise KvgenError("stdout is closed: there is nowhere to write to")
    if isinstance(sys.stdout, io.TextIOWrapper):
        if sys.stdout.isatty():
            sys.stdout.reconfigure(errors="backslashreplace")
        else:
            sys.stdout.reconfigure(encoding="utf-8")


@contextmanager
def exiting_with(code: int) -> Iterator[None]:
    """Exit with `code` after what is printed inside, also where its reader leaves before the end (`| head -1`)."""
    with _exit_codes(code):
        yield
    raise Exit(code)


@contextmanager
def _exit_codes(reader_left: int = 0, *, show_traceback: bool = False) -> Iterator[None]:
    """Turn errors into a line and an exit code.

    reader_left: the code where the reader of stdout leaves early. show_traceback: whether what led to an error comes
    before its line.
    """
    try:
        with _broken_pipes():
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
    except KvgenError as error:
        if show_traceback:
            typer.echo(escape_controls("".join(traceback.format_exception(error.__cause__ or error))), err=True)
        print_error(str(error))
        raise Exit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):  # the latter from a question that was not answered
        raise Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        _discard_stdout()
        raise Exit(reader_left) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT):
            raise
        _discard_stdout()
        print_error(f"stdout cannot be written ({error.strerror})")
        raise Exit(1) from None


@contextmanager
def _broken_pipes() -> Iterator[None]:
    """Raise BrokenPipeError where Rich and Typer make an exit with code 1 of it."""
    try:
        yield
    except SystemExit as exit_:
        if isinstance(exit_.__context__, BrokenPipeError):
            raise exit_.__context__ from None
        raise


def _flushed(code: int) -> int:
    """Write out what is left for stdout, which Python would else do after the last chance to say what went wrong."""
    try:
        with _exit_codes(code):
            pass
    except Exit as exit_:
        return exit_.exit_code
    return code


def _discard_stdout() -> None:
    """Python flushes stdout once more at exit; let that go into nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def print_error(message: str) -> None:
    one_line = " ".join(message.split())
    typer.echo(f"kvgen: error: {escape_controls(one_line)}", err=True)
