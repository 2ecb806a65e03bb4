"""`kvgen bench`: how fast a model is on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from typer import Option

from kvgen.cli import options
from kvgen.cli.chart import log_chart
from kvgen.cli.escape import escape_controls
from kvgen.cli.groups import takes_groups
from kvgen.cli.model import ModelOptions
from kvgen.cli.render import check_page, count_progress, terminal, write_json, write_page
from kvgen.errors import UsageError

if TYPE_CHECKING:
    from kvgen import Loaded
    from kvgen.bench.measure import Benchmark

_WHAT = "What to measure"
_PIPE_WIDTH = 100


@takes_groups()
def bench(
    *,
    prompts: Annotated[
        str | None,
        Option(
            metavar="N,...", help="Lengths of prompts to prefill.", show_default="128,512,2048", rich_help_panel=_WHAT
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        Option(metavar="N,...", help="Lengths to decode behind.", show_default="16,512,2048", rich_help_panel=_WHAT),
    ] = None,
    lengths: Annotated[
        str | None,
        Option(
            metavar="N,...",
            help="Lengths at which to compare with uncached decoding.",
            show_default="16,64,256,1024",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    repeat: Annotated[int, Option(min=1, help="Runs of which to take the median.", rich_help_panel=_WHAT)] = 5,
    source: ModelOptions,
    json: options.Json = False,
    html: options.Html = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure prefill, decode, memory, and what the cache gains.

    Run it alone: two programs that compute on the same cores slow each other by more than half.
    """
    sizes = {
        "prompts": _numbers("--prompts", prompts),
        "contexts": _numbers("--contexts", contexts),
        "lengths": _numbers("--lengths", lengths),
    }
    if html is not None:
        check_page(html)
    loaded = source.load(quiet=quiet)
    from kvgen.bench.measure import measure

    with count_progress("measuring", quiet=quiet) as progress:
        benchmark = measure(loaded.model, **sizes, repeat=repeat, progress=progress)
    report = _as_data(loaded, benchmark)
    if html is not None:
        from kvgen.pages.bench import render_html

        write_page(html, render_html(report))
    if json:
        write_json(report)
    else:
        _print(report)


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise UsageError(f"{option} {text!r}: give whole numbers from 1, as in 128,512")
    return numbers


def _as_data(loaded: Loaded, benchmark: Benchmark) -> dict[str, Any]:
    def with_rate(rows: tuple[Any, ...], name: str) -> list[dict[str, Any]]:
        return [{**asdict(row), name: round(getattr(row, name), 2)} for row in rows]

    return {
        "model": loaded.source,
        "engine": loaded.model.engine,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        **asdict(benchmark),
        "prefill": with_rate(benchmark.prefill, "rate"),
        "decode": with_rate(benchmark.decode, "rate"),
        "growth": with_rate(benchmark.growth, "speedup"),
    }


def _print(report: dict[str, Any]) -> None:
    console = terminal(sys.stdout, pipe_width=_PIPE_WIDTH)
    names = ("weight_bytes", "cache_bytes", "peak_bytes")
    weights, cache, peak = ("?" if report[name] is None else f"{report[name] / 1e6:.0f} MB" for name in names)
    bandwidth = report["memory_bandwidth"]
    lines = (
        f"{report['model']}, {report['engine']}, {report['dtype']} on {report['device']}, {report['threads']} threads",
        f"weights {weights}, cache {cache} at the longest context, process {peak} at its peak",
        f"memory gives {bandwidth / 1e9:.1f} GB/s",
    )
    tables = [
        _table(("prompt", "prefill tok/s"), ((str(r["tokens"]), f"{r['rate']:.0f}") for r in report["prefill"])),
        _table(
            ("context", "decode tok/s", "ms", "of memory's speed"),
            (
                (str(r["context"]), f"{r['rate']:.1f}", f"{1000 * r['seconds']:.2f}", _share(r["bandwidth"], bandwidth))
                for r in report["decode"]
            ),
        ),
        _table(
            ("length", "cached ms", "uncached ms", "speed-up"),
            (
                (str(r["length"]), f"{1000 * r['cached']:.2f}", f"{1000 * r['uncached']:.1f}", f"{r['speedup']:.1f}x")
                for r in report["growth"]
            ),
        ),
    ]
    for line in lines:
        console.print(Text(escape_controls(line)), soft_wrap=True)
    console.print(Group(*tables))
    if report["growth"]:
        points = {way: [(r["length"], 1000 * r[way]) for r in report["growth"]] for way in ("uncached", "cached")}
        console.print(Text(log_chart(points, "ms for a token behind so many", console.width, log_x=True)))


def _share(bandwidth: float | None, memory: float) -> str:
    return "?" if bandwidth is None else f"{100 * bandwidth / memory:.0f} %"


def _table(titles: tuple[str, ...], rows: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
