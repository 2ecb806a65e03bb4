"""A comparison as one self-contained HTML page, with plots. Needs matplotlib: the extra `report`."""

from __future__ import annotations

import importlib.resources
import math
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from kvgen.pages.plots import as_svg, new_axes


def render_html(report: dict[str, Any]) -> str:
    """The page for a report: `model`, `backend`, `dtype` and `comparisons` as `report.as_data` gives them.

    Raises UnsupportedError if matplotlib is not installed.
    """
    comparisons = [
        {**data, "plot": Markup(_plot(data)), "patterns": [_split_text(p) for p in data["patterns"]]}
        for data in report["comparisons"]
    ]
    page = importlib.resources.files("kvgen.pages").joinpath("comparison.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True).from_string(page)
    return template.render({**report, "comparisons": comparisons, "number": _number})


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3g}"


def _split_text(pattern: dict[str, Any]) -> dict[str, Any]:
    """The completion, cut where it parts from the reference's."""
    text, split = pattern["completion"] or "", pattern["split"]
    return {**pattern, "same": text[:split], "other": "" if split is None else text[split:]}


def _plot(data: dict[str, Any]) -> str:
    """An SVG with the largest |difference| of a logit at each step, one line a pattern, and the noise floor.

    The axis is logarithmic but for its lowest part, so that lines of zeros show.
    """
    axes = new_axes()
    gaps = {
        pattern["pattern"]: [math.nan if gap is None else gap for gap in pattern["logits"]["per_step"]]
        for pattern in data["patterns"][1:]
        if pattern["logits"]
    }
    for name, of_steps in gaps.items():
        axes.plot(range(1, len(of_steps) + 1), of_steps, marker=".", label=name)
    floor = data["noise_floor"]
    if floor:
        axes.axhline(floor, linestyle="--", color="gray", label="noise floor")
    lowest = min((gap for of_steps in gaps.values() for gap in [*of_steps, floor] if gap > 0), default=1.0)
    decade = 10.0 ** math.floor(math.log10(lowest))
    axes.set_yscale("symlog", linthresh=decade)
    axes.set_ylim(bottom=-decade / 4)
    axes.set(xlabel="step", ylabel="max |Δ logit|")
    if axes.lines:
        axes.legend()
    return as_svg(axes)
