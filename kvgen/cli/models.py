"""`kvgen models`: list, download and remove models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer import Argument, Exit, Option

from kvgen.cli import options
from kvgen.cli.commands import Command, Group
from kvgen.cli.interrupts import raise_interrupts
from kvgen.cli.render import download_progress, escape_controls, format_bytes, print_note, terminal, write_json
from kvgen.errors import UsageError

_COLUMN_GAP, _MIN_PATH_WIDTH = 3, 20

models = typer.Typer(
    add_completion=False,
    cls=Group,
    help="List, download and remove models.",
    epilog="Examples:\n\nkvgen models\n\nkvgen models pull smollm2\n\nkvgen models rm smollm2",
)
_Name = Annotated[str, Argument(metavar="NAME", help="A model of the catalogue, or a hub id owner/name.")]


@models.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_(json=False)


@models.command("list", cls=Command, epilog="Example:\n\nkvgen models list --json")
def list_(json: options.Json = False) -> None:
    """List the catalogue and the models in the caches of kvgen and Hugging Face."""
    from kvgen.hub.inventory import list_models

    entries: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "source": entry.source,
            "state": "not downloaded" if entry.path is None else "downloaded" if entry.whole else "incomplete",
            "bytes": entry.nbytes,
            "licence": entry.licence or None,
            "path": None if entry.path is None else str(entry.path),
        }
        for entry in list_models()
    ]
    if json:
        write_json(entries)
        return
    shown = [{**entry, "bytes": format_bytes(entry["bytes"]), "licence": entry["licence"] or "?"} for entry in entries]
    rows = [[escape_controls(value or "") for value in entry.values()] for entry in shown]
    _print_table(("name", "source", "state", "size", "licence", "path"), rows)


@models.command(
    cls=Command, epilog="Examples:\n\nkvgen models pull smollm2\n\nkvgen models pull HuggingFaceTB/SmolLM2-135M"
)
def pull(name: _Name, quiet: options.Quiet = False) -> None:
    """Download a model, unless it is in the cache already, and print its path."""
    from kvgen.hub.catalogue import CATALOGUE
    from kvgen.hub.names import resolve

    if name not in CATALOGUE and name.count("/") != 1:
        raise UsageError(f"{name!r} is neither in the catalogue ({', '.join(CATALOGUE)}) nor a hub id owner/name")
    raise_interrupts()
    with download_progress(quiet=quiet) as progress:
        path = resolve(name, progress=progress)
    sys.stdout.write(f"{escape_controls(str(path))}\n")


@models.command(cls=Command, epilog="Example:\n\nkvgen models rm smollm2 --yes")
def rm(
    name: _Name,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove a model from the cache. Files of an installed package are kept."""
    from kvgen.hub.inventory import remove

    if not yes:
        if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError("rm cannot ask for confirmation without a terminal: give --yes")
        if not typer.confirm(f"Remove {escape_controls(name)}?", err=True):
            raise Exit(1)
    entry = remove(name)
    if not quiet:
        print_note(f"removed {name}, {format_bytes(entry.nbytes)}")


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on a terminal, or tab-separated fields without titles in a pipe, for cut and awk."""
    console = terminal(sys.stdout)
    if not console.is_terminal:
        sys.stdout.write("".join("\t".join(row) + "\n" for row in rows))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    widths = [max(map(len, column)) + _COLUMN_GAP for column in zip(titles, *rows, strict=True)]
    if console.width < sum(widths[:-1]) + _MIN_PATH_WIDTH:  # too narrow for a table: one line per field
        for row in rows:
            for title, cell in zip(titles, row, strict=True):
                console.print(Text(f"{title:<9}", "bold").append(cell, "not bold"), soft_wrap=True)
            console.print()
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
