"""Render `kvgen compare` and `kvgen bench` reports as self-contained HTML pages with plots.

Needs matplotlib (extra: report); raises ImportError without it.
"""

from __future__ import annotations

import importlib.resources
import io
import math
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def render_benchmark(report: dict[str, Any]) -> str:
    """Return the HTML page for the output of `kvgen bench --json`."""
    axes = _new_axes()
    lengths = [row["length"] for row in report["growth"]]
    for way in ("uncached", "cached"):
        axes.plot(lengths, [1000 * row[way] for row in report["growth"]], marker="o", label=way)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms per token")
    axes.legend()
    return _render("bench.html", {**report, "plot": _svg(axes) if lengths else ""})


def render_comparison(report: dict[str, Any]) -> str:
    """Return the HTML page for the output of `kvgen compare --json`."""
    comparisons = [
        {**data, "plot": _plot_differences(data), "patterns": [_split_text(pattern) for pattern in data["patterns"]]}
        for data in report["comparisons"]
    ]
    return _render("comparison.html", {**report, "comparisons": comparisons, "number": _format_number})


def _render(page: str, values: dict[str, Any]) -> str:
    source = importlib.resources.files("kvgen.pages").joinpath(page).read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(source).render(values)


def _format_number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3g}"


def _split_text(pattern: dict[str, Any]) -> dict[str, Any]:
    """Split the completion before its first difference from the reference."""
    text, split = pattern["completion"] or "", pattern["split"]
    return {**pattern, "same": text[:split], "other": "" if split is None else text[split:]}


def _plot_differences(data: dict[str, Any]) -> Markup:
    """Plot the largest logit difference of each step, one line per pattern, and the noise floor.

    The axis is logarithmic, and linear near zero so that zeros are visible.
    """
    axes = _new_axes()
    gaps = {
        pattern["pattern"]: [math.nan if gap is None else gap for gap in pattern["logits"]["per_step"]]
        for pattern in data["patterns"][1:]
        if pattern["logits"]
    }
    for name, per_step in gaps.items():
        axes.plot(range(1, len(per_step) + 1), per_step, marker=".", label=name)
    floor = data["noise_floor"]
    if floor:
        axes.axhline(floor, linestyle="--", color="gray", label="noise floor")
    lowest = min((gap for per_step in gaps.values() for gap in [*per_step, floor] if gap > 0), default=1.0)
    decade = 10.0 ** math.floor(math.log10(lowest))
    axes.set_yscale("symlog", linthresh=decade)
    axes.set_ylim(bottom=-decade / 4)
    axes.set(xlabel="step", ylabel="max |Δ logit|")
    if axes.lines:
        axes.legend()
    return _svg(axes)


def _new_axes() -> Axes:
    from matplotlib.figure import Figure

    return Figure(figsize=(9, 3.5), layout="constrained").add_subplot()


def _svg(axes: Axes) -> Markup:
    """Return the plot as an <svg> element, without the XML prolog."""
    buffer = io.StringIO()
    axes.get_figure(root=True).savefig(buffer, format="svg")  # type: ignore[union-attr]
    return Markup(buffer.getvalue().partition("<!DOCTYPE")[2].partition(">")[2] or buffer.getvalue())
