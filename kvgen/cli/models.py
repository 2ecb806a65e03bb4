"""`kvgen models`: what is on this machine, fetching it, removing it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from kvgen.cli import options
from kvgen.cli.errors import Group
from kvgen.cli.escape import escape_controls
from kvgen.cli.help import Command
from kvgen.cli.render import download_progress, format_bytes, print_note, terminal, write_json
from kvgen.errors import UsageError

if TYPE_CHECKING:
    from kvgen.hub.inventory import Entry

_GAP, _NARROWEST = 3, 20  # columns between those of a table, and of its last one

models = typer.Typer(
    cls=Group,
    help="List the models of the catalogue and of the caches, fetch one, remove one.",
    epilog="Examples:\n\nkvgen models\n\nkvgen models pull smollm2\n\nkvgen models rm smollm2",
)
_Name = Annotated[str, Argument(metavar="NAME", help="A name of the catalogue, or a hub id owner/name.")]


@models.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_(json=False)


@models.command("list", cls=Command, epilog="Example:\n\nkvgen models list --json")
def list_(json: options.Json = False) -> None:
    """List them: name, state, size, licence, and where they are."""
    from kvgen.hub.inventory import list_models

    def state(entry: Entry) -> str:
        return "not fetched" if entry.path is None else "here" if entry.whole else "incomplete"

    entries = list_models()
    if json:
        write_json([_as_data(entry, state(entry)) for entry in entries])
        return
    rows = [
        (
            entry.name,
            entry.source,
            state(entry),
            format_bytes(entry.nbytes),
            entry.licence or "?",
            str(entry.path or ""),
        )
        for entry in entries
    ]
    _print_table(("name", "from", "state", "size", "licence", "path"), rows)


@models.command(
    cls=Command, epilog="Examples:\n\nkvgen models pull smollm2\n\nkvgen models pull HuggingFaceTB/SmolLM2-135M"
)
def pull(name: _Name, quiet: options.Quiet = False) -> None:
    """Fetch a model into the cache, unless it is there."""
    from kvgen.hub.catalogue import CATALOGUE
    from kvgen.hub.names import resolve

    if name not in CATALOGUE and name.count("/") != 1:
        raise UsageError(
            f"{name!r} is neither a name of the catalogue ({', '.join(CATALOGUE)}) nor a hub id owner/name"
        )
    with download_progress(quiet=quiet) as progress:
        path = resolve(name, progress=progress)
    sys.stdout.write(f"{escape_controls(str(path))}\n")


@models.command(cls=Command, epilog="Example:\n\nkvgen models rm smollm2 --yes")
def rm(
    name: _Name,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove a model from the cache. Files that an installed package owns stay."""
    from kvgen.hub.inventory import remove

    if not yes:
        if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError("rm asks on a terminal; give --yes elsewhere")
        if not typer.confirm(f"Remove {escape_controls(name)}?", err=True):
            raise Exit(1)
    entry = remove(name)
    if not quiet:
        print_note(f"removed {name}, {format_bytes(entry.nbytes)}")


def _as_data(entry: Entry, state: str) -> dict[str, Any]:
    return {
        "name": entry.name,
        "source": entry.source,
        "state": state,
        "bytes": entry.nbytes,
        "licence": entry.licence or None,
        "path": None if entry.path is None else str(entry.path),
    }


def _print_table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table on a terminal; in a pipe, fields with tabs between them and no titles, for cut and awk."""
    console = terminal(sys.stdout)
    if not console.is_terminal:
        sys.stdout.write("".join("\t".join(map(escape_controls, row)) + "\n" for row in rows))
        return
    widths = [max(map(len, column)) + _GAP for column in zip(titles, *rows, strict=True)]
    if console.width < sum(widths[:-1]) + _NARROWEST:  # no room for a table: a line for each field
        for row in rows:
            for title, cell in zip(titles, row, strict=True):
                console.print(Text(f"{title:<9}", "bold").append(escape_controls(cell), "not bold"), soft_wrap=True)
            console.print()
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_controls(cell)) for cell in row))
    console.print(table)
