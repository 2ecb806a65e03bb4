"""Print a comparison: verdict, table, texts, chart, findings and advice."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kvgen.cli.render import escape_controls, terminal
from kvgen.cli.tables import log_chart, number_table

_BAD = "bold red"
_STYLES = {"equivalent": "green", "near-tie": "green", "lossy": "yellow", "unsupported": "yellow"}
_STYLES |= {"equal within rounding": "green", "rounded differently": "yellow"}
_PIPE_WIDTH = 110
_LABEL_WIDTH = 18


def print_comparison(data: dict[str, Any], report: dict[str, Any]) -> None:
    """Print one comparison of a `kvgen compare` report on stdout."""
    console = terminal(sys.stdout, pipe_width=_PIPE_WIDTH)
    patterns, prompt = data["patterns"], data["prompt"]
    verdicts = [Text(f"{p['pattern']}: ").append_text(_verdict(p)) for p in patterns[1:] or patterns]
    console.print(Text("   ").join(verdicts), soft_wrap=True)
    summary = (
        f"{report['model']}, {report['backend']} backend, {report['dtype']}; "
        f"prompt {prompt if len(prompt) <= 60 else prompt[:57] + '...'!r}, {len(data['text_ids'])} steps. "
        f"{_describe_noise(data)}"
    )
    console.print(Text(escape_controls(summary), style="dim"))
    console.print(_table(patterns, console))
    _print_texts(console, patterns)
    if chart := _chart(patterns, console.width):
        console.print(Text(chart))
    for pattern in patterns:
        _print_findings(console, pattern)
    if data["cross_check"]:
        _print_cross_check(console, data["cross_check"])
    console.print(Text(f"Not tested: {data['not_tested']}.", style="dim"))


def _print_cross_check(console: Console, check: dict[str, Any]) -> None:
    logits, name = check["logits"], f"{check['reference']}: "
    figures = (
        f"max |Δ| {_format_number(logits['max_abs'])}, KL {_format_number(logits['kl'])} nats, top-1 "
        f"{100 * logits['top1']:.0f} %; RMS {_format_number(check['rms'])} in {check['positions']} positions, where "
        f"rounding alone may give {_format_number(check['rounding_limit'])}"
    )
    first = check["first_difference"]
    figures += "." if first is None else f"; first after {first} positions."
    verdict = Text(check["verdict"], _STYLES.get(check["verdict"], _BAD))
    console.print(Text(f"against {name}", "bold").append_text(verdict).append(f". {figures}", "not bold"))
    for found in check["findings"]:
        line = Text(f"against {name}", "bold").append(escape_controls(found["text"]), "not bold")
        console.print(line.append(f" ({escape_controls(found['evidence'])})", "dim not bold"))


def _verdict(pattern: dict[str, Any]) -> Text:
    return Text(pattern["verdict"], _STYLES.get(pattern["verdict"], _BAD))


def _describe_noise(data: dict[str, Any]) -> str:
    if all(pattern["exact"] for pattern in data["patterns"] if not pattern["write_instead"]):
        return "Cached logits equal uncached logits, bit for bit."
    return (
        f"Noise floor {data['noise_floor']:.2g}; uncached decoding in one pass and step by step differ by at most "
        f"{data['reference_max_abs']:.2g}."
    )


# Number columns, most important first. Those that do not fit the width are left out; verdicts are never cut.
_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "max |Δ|": lambda pattern: _format_number(pattern["logits"]["max_abs"]),
    "token": lambda pattern: _first_difference(pattern),
    "KL": lambda pattern: _format_number(pattern["logits"]["kl"]),
    "speed-up": lambda pattern: f"{pattern['speedup']:.1f}x",
    "tok/s": lambda pattern: f"{pattern['tokens_per_second']:.1f}",
    "top-1": lambda pattern: f"{100 * pattern['logits']['top1']:.0f} %",
    "computed": lambda pattern: "?" if pattern["positions_computed"] is None else str(pattern["positions_computed"]),
    "mean |Δ|": lambda pattern: _format_number(pattern["logits"]["mean_abs"]),
    "ΔNLL": lambda pattern: _format_number(pattern["logits"]["nll_change"], "+"),
}
_ORDER = ("max |Δ|", "mean |Δ|", "KL", "top-1", "ΔNLL", "token", "computed", "tok/s", "speed-up")


def _table(patterns: list[dict[str, Any]], console: Console) -> Table:
    """Return the table with as many number columns as fit the console."""
    unbounded = console.options.update(width=sys.maxsize)
    tables = (_table_with(patterns, list(_COLUMNS)[:count]) for count in range(len(_COLUMNS), 0, -1))
    fits = (table for table in tables if Measurement.get(console, unbounded, table).maximum <= console.width)
    return next(fits, _table_with(patterns, []))


def _table_with(patterns: list[dict[str, Any]], titles: list[str]) -> Table:
    shown = [title for title in _ORDER if title in titles]
    rows = [
        [pattern["pattern"], _verdict(pattern), *(_COLUMNS[title](pattern) for title in shown if pattern["logits"])]
        for pattern in patterns
    ]
    return number_table(("pattern", "verdict", *shown), rows, left=2)


def _format_number(value: float | None, sign: str = "") -> str:
    return "none" if value is None else f"{value:{sign}.2g}"


def _first_difference(pattern: dict[str, Any]) -> str:
    if pattern["tokens"] is None:
        return "none"
    if pattern["first_difference"] is None:
        return "same"
    return f"{pattern['first_difference'] + 1}{' (tie)' if pattern['tokens_verdict'] == 'near-tie' else ''}"


def _print_texts(console: Console, patterns: list[dict[str, Any]]) -> None:
    """Print the completions, marking the text from the first different token on."""
    width = max(20, console.width - _LABEL_WIDTH)
    for pattern in patterns:
        if pattern["completion"] is None:
            continue
        completion, split = pattern["completion"].replace("\n", "\u23ce"), pattern["split"]
        shown = same = escape_controls(completion[:split])
        if split is not None:
            shown += f"\u27e6{escape_controls(completion[split:])}\u27e7"
        position = 0
        for number, part in enumerate(textwrap.wrap(shown, width, drop_whitespace=False) or [""]):
            line = Text(f"{'' if number else pattern['pattern']:<{_LABEL_WIDTH}}", "bold")
            cut = max(0, len(same) - position)
            line.append(part[:cut], "not bold").append(part[cut:], _BAD)
            console.print(line, soft_wrap=True)
            position += len(part)
    console.print()


def _chart(patterns: list[dict[str, Any]], width: int) -> str:
    """Plot the largest logit difference of each step; "" if there is none."""
    points = {
        pattern["pattern"]: [(step, gap) for step, gap in enumerate(pattern["logits"]["per_step"], start=1) if gap]
        for pattern in patterns[1:]
        if pattern["logits"]
    }
    points = {name: differences for name, differences in points.items() if differences}
    return log_chart(points, "largest logit difference at each step", width) if points else ""


def _print_findings(console: Console, pattern: dict[str, Any]) -> None:
    lines = [(finding["text"], f" ({finding['evidence']})") for finding in pattern["findings"]]
    if pattern["reason"]:
        lines.append((escape_controls(pattern["reason"]), ""))
    lines += [(line, "") for line in _describe_probes(pattern["probes"])]
    if pattern["write_instead"] and pattern["verdict"] == "different":
        lines.append((f"Instead: {pattern['write_instead']}", ""))
    for text, evidence in lines:
        console.print(Text(f"{pattern['pattern']}: ", "bold").append(text, "not bold").append(evidence, "dim not bold"))


def _describe_probes(probes: list[dict[str, Any]]) -> list[str]:
    """Return a line for exact probes, one for probes within rounding error, and one for each that was not checked."""
    right = [probe for probe in probes if not probe["wrong"] and not probe["note"]]
    exact = [probe["name"] for probe in right if probe["exact"]]
    rounded = [f"{probe['name']} ({probe['ratio']:.1f} times the noise)" for probe in right if not probe["exact"]]
    lines = [f"equal bit for bit in {', '.join(exact)}."] if exact else []
    lines += [f"equal up to rounding in {', '.join(rounded)}."] if rounded else []
    return lines + [f"{probe['name']} {escape_controls(probe['note'])}." for probe in probes if probe["note"]]
