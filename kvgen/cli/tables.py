"""Tables and charts for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvgen.cli.render import escape_controls, terminal

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_CHART_MARKERS = "ox+*#"
_CHART_WIDTH, _CHART_HEIGHT = 100, 12


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and values: an aligned grid on a terminal, one line per fact in a pipe."""
    console = terminal(sys.stdout)
    facts = [(name, escape_controls(value)) for name, value in facts]
    if not console.is_terminal:
        sys.stdout.write("".join(f"{name:<15}{value}\n" for name, value in facts))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    console.print(table)


def number_table(titles: Sequence[str], rows: Iterable[Sequence[str | Text]], *, left: int = 0) -> Table:
    """Return a table whose first `left` columns are left-aligned and the others right-aligned.

    On a narrow terminal, cells are folded, since a number without its last digits would be another one.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def log_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], title: str, width: int, *, log_x: bool = False
) -> str:
    """Plot the (x, y) points of each line in characters, on a logarithmic y axis."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(min(width, _CHART_WIDTH), _CHART_HEIGHT)
    plotext.yscale("log")
    if log_x:
        plotext.xscale("log")
    for (label, points), marker in zip(lines.items(), _CHART_MARKERS, strict=False):
        plotext.scatter(*zip(*points, strict=True), label=label, marker=marker)
    plotext.title(title)
    chart: str = plotext.uncolorize(plotext.build())
    return "\n".join(line.rstrip() for line in chart.splitlines())
