"""How errors and interruptions reach the user: one line on stderr and an exit code. Never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer import Exit
from typer.core import TyperGroup
from typer.exceptions import TyperException

from kvgen.cli.escape import escape_controls
from kvgen.errors import KvgenError

EXIT_INTERRUPTED = 130


class Group(TyperGroup):
    """A command group whose commands may raise KvgenError, be interrupted, or lose their reader."""

    def main(self, *args: Any, **options: Any) -> Any:
        # An option with an optional value, which Typer does not have.
        given = ["--verify-cache=1" if word == "--verify-cache" else word for word in sys.argv[1:]]
        try:
            code = super().main(given, *args, **{**options, "standalone_mode": False})
        except TyperException as error:  # the command line itself could not be understood
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "kvgen"
            _print_error(f"{error.format_message()} (see '{where} --help')")
            code = error.exit_code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        with _exit_codes():
            return super().invoke(ctx)


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except KvgenError as error:
        _print_error(str(error))
        raise Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader has what it wanted (`| head -1`). Python flushes stdout once more at exit, into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Exit(0) from None


def _print_error(message: str) -> None:
    one_line = " ".join(message.split())
    typer.echo(f"kvgen: error: {escape_controls(one_line)}", err=True)
