"""A comparison on a terminal: verdict, table, texts, chart, diagnosis, and what to write instead."""

from __future__ import annotations

import sys
import textwrap
from typing import Any

from rich import box
from rich.console import Console
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
    """Print one comparison of a report, as `kvgen.compare.report` makes them, on stdout."""
    console = terminal(sys.stdout, pipe_width=_PIPE_WIDTH)
    console.print(_verdict(data))
    console.print(
        Text(
            escape_controls(
                f"{report['model']}, {report['backend']} backend, {report['dtype']}; prompt {data['prompt']!r}, "
                f"{len(data['text_ids'])} steps. Noise floor {data['noise']['floor']:.2g} "
                f"(measured by {data['noise']['measured_by']}); " + _oracle(data)
            ),
            style="dim",
        )
    )
    console.print(_table(data["patterns"]))
    _print_texts(console, data["patterns"])
    chart = _chart(data["patterns"], console.width)
    if chart:
        console.print(Text(chart))
    for pattern in data["patterns"]:
        _print_findings(console, pattern)


def _verdict(data: dict[str, Any]) -> Text:
    line = Text()
    reference, *others = data["patterns"]
    for pattern in others or [reference]:
        line.append(f"{pattern['pattern']}: ").append(pattern["verdict"], _STYLES.get(pattern["verdict"], _BAD))
        line.append("   ")
    line.rstrip()
    return line


def _oracle(data: dict[str, Any]) -> str:
    gap = data["oracle_max_abs"]
    return "no parallel pass to check with." if gap is None else f"one parallel pass differs by at most {gap:.2g}."


def _table(patterns: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("pattern", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for title in ("max |Δ|", "mean |Δ|", "KL", "top-1", "ΔNLL", "token", "computed", "tok/s", "speed-up"):
        table.add_column(title, justify="right", no_wrap=True)
    for pattern in patterns:
        verdict = Text(pattern["verdict"], _STYLES.get(pattern["verdict"], _BAD))
        table.add_row(pattern["pattern"], verdict, *_numbers(pattern))
    return table


def _numbers(pattern: dict[str, Any]) -> list[str]:
    logits = pattern["logits"]
    if logits is None:
        return []
    first = pattern["first_difference"]
    tie = " (tie)" if pattern["tokens_verdict"] == "near-tie" else ""
    return [
        f"{logits['max_abs']:.2g}",
        f"{logits['mean_abs']:.2g}",
        f"{logits['kl']:.2g}",
        f"{100 * logits['top1']:.0f} %",
        f"{logits['nll_change']:+.2g}",
        "same" if first is None else f"{first + 1}{tie}",
        "?" if pattern["positions_computed"] is None else str(pattern["positions_computed"]),
        f"{pattern['tokens_per_second']:.1f}",
        f"{pattern['speedup']:.1f}x",
    ]


def _print_texts(console: Console, patterns: list[dict[str, Any]]) -> None:
    """The texts, one below the other, with what follows the first other token marked."""
    width = console.width - _LABEL_WIDTH
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
    drawn = [pattern for pattern in patterns[1:] if pattern["logits"] and pattern["logits"]["max_abs"] > 0]
    points = {
        pattern["pattern"]: [(step, gap) for step, gap in enumerate(pattern["logits"]["per_step"], start=1) if gap > 0]
        for pattern in drawn
    }
    return log_chart(points, "largest |difference| of a logit at each step", width) if points else ""


def _print_findings(console: Console, pattern: dict[str, Any]) -> None:
    lines = [(f"{finding['text']}", f" ({finding['evidence']})") for finding in pattern["findings"]]
    if pattern["reason"]:
        lines.append((escape_controls(pattern["reason"]), ""))
    for probe in pattern["probes"]:
        note = probe["note"] or f"{probe['ratio']:.2g} times the noise: {'WRONG' if probe['wrong'] else 'right'}"
        lines.append((f"{probe['name']}: {escape_controls(note)}", ""))
    if pattern["write_instead"] and pattern["verdict"] == "different":
        lines.append((f"Instead: {pattern['write_instead']}", ""))
    for text, evidence in lines:
        console.print(Text(f"{pattern['pattern']}: ", "bold").append(text, "not bold").append(evidence, "dim not bold"))
