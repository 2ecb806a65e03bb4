"""A comparison on a terminal: verdict, table, texts, chart, diagnosis, and what to write instead."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvgen.cli.chart import log_chart
from kvgen.cli.escape import escape_controls
from kvgen.cli.render import terminal

_GOOD, _BAD, _NEUTRAL = "green", "bold red", "yellow"
_STYLES = {"equivalent": _GOOD, "near-tie": _GOOD, "lossy": _NEUTRAL, "unsupported": _NEUTRAL}
_PIPE_WIDTH = 110
_LABEL_WIDTH = 18


def print_comparison(data: dict[str, Any], report: dict[str, Any]) -> None:
    """Print one comparison of a report, as `kvgen.comparison.report` makes them, on stdout."""
    console = terminal(sys.stdout, pipe_width=_PIPE_WIDTH)
    console.print(_verdict(data), soft_wrap=True)
    console.print(
        Text(
            escape_controls(
                f"{report['model']}, {report['backend']} backend, {report['dtype']}; prompt {_short(data['prompt'])}, "
                f"{len(data['text_ids'])} steps. {_floor(data)}"
            ),
            style="dim",
        )
    )
    console.print(_table(data["patterns"], console))
    _print_texts(console, data["patterns"])
    chart = _chart(data["patterns"], console.width)
    if chart:
        console.print(Text(chart))
    for pattern in data["patterns"]:
        _print_findings(console, pattern)
    console.print(Text(f"Not looked at: {data['not_looked_at']}.", style="dim"))


def _verdict(data: dict[str, Any]) -> Text:
    line = Text()
    reference, *others = data["patterns"]
    for pattern in others or [reference]:
        line.append(f"{pattern['pattern']}: ").append(pattern["verdict"], _STYLES.get(pattern["verdict"], _BAD))
        line.append("   ")
    line.rstrip()
    return line


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")


def _floor(data: dict[str, Any]) -> str:
    if all(pattern["exact"] for pattern in data["patterns"] if not pattern["write_instead"]):
        return "Cached logits are the uncached ones, bit for bit."
    return (
        f"Noise floor {data['noise_floor']:.2g}; uncached decoding in one pass and step by step differs by at most "
        f"{data['reference_max_abs']:.2g}."
    )


# The columns of numbers, the most telling first. The verdict is never cut: what does not fit is left out.
_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "max |Δ|": lambda pattern: _number(pattern["logits"]["max_abs"]),
    "token": lambda pattern: _first_token(pattern),
    "KL": lambda pattern: _number(pattern["logits"]["kl"]),
    "speed-up": lambda pattern: f"{pattern['speedup']:.1f}x",
    "tok/s": lambda pattern: f"{pattern['tokens_per_second']:.1f}",
    "top-1": lambda pattern: f"{100 * pattern['logits']['top1']:.0f} %",
    "computed": lambda pattern: "?" if pattern["positions_computed"] is None else str(pattern["positions_computed"]),
    "mean |Δ|": lambda pattern: _number(pattern["logits"]["mean_abs"]),
    "ΔNLL": lambda pattern: _number(pattern["logits"]["nll_change"], "+"),
}
_ORDER = ("max |Δ|", "mean |Δ|", "KL", "top-1", "ΔNLL", "token", "computed", "tok/s", "speed-up")


def _table(patterns: list[dict[str, Any]], console: Console) -> Table:
    """As many columns as there is room for."""
    chosen: list[str] = []
    unbounded = console.options.update(width=sys.maxsize)
    table = _table_of(patterns, chosen)
    for title in _COLUMNS:
        wider = _table_of(patterns, [*chosen, title])
        if Measurement.get(console, unbounded, wider).maximum > console.width:
            break
        chosen.append(title)
        table = wider
    return table


def _table_of(patterns: list[dict[str, Any]], titles: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("pattern", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    shown = [title for title in _ORDER if title in titles]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for pattern in patterns:
        verdict = Text(pattern["verdict"], _STYLES.get(pattern["verdict"], _BAD))
        numbers = [] if pattern["logits"] is None else [_COLUMNS[title](pattern) for title in shown]
        table.add_row(pattern["pattern"], verdict, *numbers)
    return table


def _number(value: float | None, sign: str = "") -> str:
    return "none" if value is None else f"{value:{sign}.2g}"


def _first_token(pattern: dict[str, Any]) -> str:
    first = pattern["first_difference"]
    if pattern["tokens"] is None:
        return "none"
    tie = " (tie)" if pattern["tokens_verdict"] == "near-tie" else ""
    return "same" if first is None else f"{first + 1}{tie}"


def _print_texts(console: Console, patterns: list[dict[str, Any]]) -> None:
    """The texts, one below the other, with what follows the first other token marked."""
    width = max(20, console.width - _LABEL_WIDTH)
    for pattern in patterns:
        if pattern["completion"] is None:
            continue
        completion = pattern["completion"].replace("\n", "\u23ce")
        same, other = escape_controls(completion[: pattern["split"]]), ""
        if pattern["split"] is not None:
            other = f"\u27e6{escape_controls(completion[pattern['split'] :])}\u27e7"
        start, shown = len(same), same + other
        position = 0
        for number, part in enumerate(textwrap.wrap(shown, width, drop_whitespace=False) or [""]):
            line = Text(f"{'' if number else pattern['pattern']:<{_LABEL_WIDTH}}", "bold")
            cut = max(0, start - position)
            line.append(part[:cut], "not bold").append(part[cut:], _BAD)
            console.print(line, no_wrap=True)
            position += len(part)
    console.print()


def _chart(patterns: list[dict[str, Any]], width: int) -> str:
    """The largest |difference| of a logit at each step, on a logarithmic scale."""
    points = {
        pattern["pattern"]: [(step, gap) for step, gap in enumerate(pattern["logits"]["per_step"], start=1) if gap]
        for pattern in patterns[1:]
        if pattern["logits"]
    }
    points = {name: of_pattern for name, of_pattern in points.items() if of_pattern}
    return log_chart(points, "largest |difference| of a logit at each step", width) if points else ""


def _print_findings(console: Console, pattern: dict[str, Any]) -> None:
    lines = [(f"{finding['text']}", f" ({finding['evidence']})") for finding in pattern["findings"]]
    if pattern["reason"]:
        lines.append((escape_controls(pattern["reason"]), ""))
    lines += [(line, "") for line in _probe_lines(pattern["probes"])]
    if pattern["write_instead"] and pattern["verdict"] == "different":
        lines.append((f"Instead: {pattern['write_instead']}", ""))
    for text, evidence in lines:
        console.print(Text(f"{pattern['pattern']}: ", "bold").append(text, "not bold").append(evidence, "dim not bold"))


def _probe_lines(probes: list[dict[str, Any]]) -> list[str]:
    """What the probes found: those that are right in one line, those that were not checked each with its reason."""
    lines = []
    right = [probe for probe in probes if not probe["wrong"] and not probe["note"]]
    for exact, how in ((True, "the same bits"), (False, "the same but for rounding")):
        names = [
            probe["name"] + ("" if exact else f" ({probe['ratio']:.1f} times the noise)")
            for probe in right
            if probe["exact"] is exact
        ]
        if names:
            lines.append(f"{how} in {', '.join(names)}.")
    return lines + [f"{probe['name']} {escape_controls(probe['note'])}." for probe in probes if probe["note"]]
