"""A comparison as one self-contained HTML page, with plots. Needs matplotlib: the extra `report`."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from kvgen.plots import as_svg, new_axes


def render_html(report: dict[str, Any]) -> str:
    """The page for a report: `model`, `backend`, `dtype` and `comparisons` as `report.as_data` gives them.

    Raises UnsupportedError if matplotlib is not installed.
    """
    comparisons = [
        {**data, "plot": Markup(_plot(data["patterns"])), "patterns": [_split_text(p) for p in data["patterns"]]}
        for data in report["comparisons"]
    ]
    page = importlib.resources.files("kvgen.compare").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True).from_string(page)
    return template.render({**report, "comparisons": comparisons})


def _split_text(pattern: dict[str, Any]) -> dict[str, Any]:
    """The completion, cut where it parts from the reference's."""
    text, split = pattern["completion"] or "", pattern["split"]
    return {**pattern, "same": text[:split], "other": "" if split is None else text[split:]}


def _plot(patterns: Sequence[dict[str, Any]]) -> str:
    """An SVG with the largest |difference| of a logit at each step, one line a pattern."""
    axes = new_axes()
    for pattern in patterns[1:]:
        if pattern["logits"]:
            steps = range(1, len(pattern["logits"]["per_step"]) + 1)
            axes.plot(steps, pattern["logits"]["per_step"], marker=".", label=pattern["pattern"])
    axes.set(yscale="log", xlabel="step", ylabel="max |Δ logit|")
    if axes.lines:
        axes.legend()
    return as_svg(axes)
