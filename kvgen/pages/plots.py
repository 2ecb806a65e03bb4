"""Plots for HTML pages. Needs matplotlib: the extra `report`."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from kvgen.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes() -> Axes:
    """An empty plot. Raises UnsupportedError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("--html draws with matplotlib: pip install 'kvgen[report]'") from None
    return Figure(figsize=(9, 3.5), layout="constrained").add_subplot()


def as_svg(axes: Axes) -> str:
    """The plot as an SVG element."""
    buffer = io.StringIO()
    axes.get_figure(root=True).savefig(buffer, format="svg")  # type: ignore[union-attr]
    return buffer.getvalue().partition("<!DOCTYPE")[2].partition(">")[2] or buffer.getvalue()
