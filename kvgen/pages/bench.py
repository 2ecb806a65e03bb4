"""A benchmark as one self-contained HTML page, with a plot. Needs matplotlib: the extra `report`."""

from __future__ import annotations

import importlib.resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from kvgen.pages.plots import as_svg, new_axes


def render_html(report: dict[str, Any]) -> str:
    """The page for what `kvgen bench --json` prints.

    Raises UnsupportedError if matplotlib is not installed.
    """
    page = importlib.resources.files("kvgen.pages").joinpath("bench.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True).from_string(page)
    return template.render({**report, "plot": Markup(_plot(report["growth"]))})


def _plot(growth: list[dict[str, float]]) -> str:
    axes = new_axes()
    lengths = [row["length"] for row in growth]
    for way in ("uncached", "cached"):
        axes.plot(lengths, [1000 * row[way] for row in growth], marker="o", label=way)
    axes.set(xscale="log", yscale="log", xlabel="tokens before it", ylabel="ms for a token")
    if growth:
        axes.legend()
    return as_svg(axes)
