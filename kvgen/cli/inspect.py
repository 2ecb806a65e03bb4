"""`kvgen inspect`: what a checkpoint is, and whether and how kvgen runs it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from rich.text import Text
from typer import Argument

from kvgen.cli import options
from kvgen.cli.errors import exiting_with
from kvgen.cli.escape import escape_controls
from kvgen.cli.render import download_progress, format_bytes, terminal, write_json

if TYPE_CHECKING:
    from kvgen.loading.inspect import Inspection


def inspect(
    model: Annotated[str | None, Argument(metavar="MODEL", help=options.CHECKPOINT, show_default="smollm2")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a checkpoint's family, mechanisms, sizes, tokenizer and KV cache. No tensor is read.

    Exit code 0 if kvgen runs it; 1 if not, with the field that is the obstacle.
    """
    from kvgen.loading.inspect import as_data
    from kvgen.loading.inspect import inspect as inspect_checkpoint

    with download_progress(quiet=quiet) as progress:
        inspection = inspect_checkpoint(model, progress=progress)
    with exiting_with(1 if inspection.backend is None or inspection.vocabulary is None else 0):
        if json:
            write_json(as_data(inspection))
        else:
            _print(inspection)


def _print(inspection: Inspection) -> None:
    console = terminal(sys.stdout)
    rows = [(name, escape_controls(value)) for name, value in _rows(inspection)]
    if not console.is_terminal:  # a line for each subject, for grep
        sys.stdout.write("".join(f"{name:<15}{value}\n" for name, value in rows))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    console.print(table)


def _rows(inspection: Inspection) -> list[tuple[str, str]]:
    types = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in inspection.types.items())
    rows = [
        ("path", str(inspection.path)),
        ("kind", f"{inspection.kind} ({inspection.format})"),
        ("runs on", inspection.backend or "nothing that kvgen has"),
    ]
    if inspection.obstacle:
        rows.append(("obstacle", inspection.obstacle))
    rows += [
        ("parameters", f"{inspection.parameters:,}"),
        ("in the files", f"{format_bytes(inspection.nbytes)}: {types}"),
        *inspection.mechanisms.items(),
    ]
    if inspection.config is not None and inspection.cache_bytes_per_token is not None:
        context = inspection.config.context_length
        full = inspection.cache_bytes_full
        rows += [
            ("context", "without bound" if context is None else f"{context:,} tokens"),
            (
                "KV cache",
                f"{format_bytes(inspection.cache_bytes_per_token)} a token"
                + ("" if full is None else f", {format_bytes(full)} at full context")
                + " (float32; half of it in bfloat16)",
            ),
        ]
    tokenizer = inspection.tokenizer_obstacle or f"{inspection.vocabulary:,} tokens"
    return [*rows, ("tokenizer", tokenizer), ("chat template", "yes" if inspection.has_chat_template else "no")]
