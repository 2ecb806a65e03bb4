"""Charts of characters, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MARKERS = "ox+*#"
_MOST_WIDTH, _HEIGHT = 100, 12


def log_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], title: str, width: int, *, log_x: bool = False
) -> str:
    """Points (x, y) of each line, on a logarithmic scale of y, and perhaps of x."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(min(width, _MOST_WIDTH), _HEIGHT)
    plotext.yscale("log")
    if log_x:
        plotext.xscale("log")
    for (label, points), marker in zip(lines.items(), _MARKERS, strict=False):
        plotext.scatter(*zip(*points, strict=True), label=label, marker=marker)
    plotext.title(title)
    chart: str = plotext.uncolorize(plotext.build())
    return "\n".join(line.rstrip() for line in chart.splitlines())
