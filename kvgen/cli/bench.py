"""`kvgen bench`: measure a model's speed and memory on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from kvgen.cli import options
from kvgen.cli.groups import ModelOptions, takes_groups
from kvgen.cli.render import check_page, count_progress, escape_controls, terminal, write_file, write_json
from kvgen.errors import UsageError

if TYPE_CHECKING:
    from kvgen import Loaded
    from kvgen.bench.measure import Benchmark

_option = partial(Option, rich_help_panel="What to measure")
_lengths_option = partial(_option, metavar="N,...")
_PIPE_WIDTH = 100


@takes_groups()
def bench(
    *,
    prompts: Annotated[
        str | None, _lengths_option(help="Prompt lengths for prefill.", show_default="128,512,2048")
    ] = None,
    contexts: Annotated[
        str | None, _lengths_option(help="Context lengths for decoding.", show_default="16,512,2048")
    ] = None,
    lengths: Annotated[
        str | None,
        _lengths_option(help="Lengths for comparing cached with uncached decoding.", show_default="16,64,256,1024"),
    ] = None,
    repeat: Annotated[int, _option(min=1, help="Runs per measurement; the median counts.")] = 5,
    source: ModelOptions,
    json: options.Json = False,
    html: options.Html = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure prefill, decoding, memory, and the speed-up from the cache.

    Run it with nothing else on the machine: sharing the cores with another program can more than halve the speed.
    """
    given = {"prompts": prompts, "contexts": contexts, "lengths": lengths}
    sizes = {name: None if text is None else _parse_lengths(f"--{name}", text) for name, text in given.items()}
    if html is not None:
        check_page(html)
    loaded = source.load(quiet=quiet)
    from kvgen.bench.measure import measure

    with count_progress("measuring", quiet=quiet) as progress:
        benchmark = measure(loaded.model, **sizes, repeat=repeat, progress=progress)
    report = _as_data(loaded, benchmark)
    if html is not None:
        from kvgen.pages import render_benchmark

        write_file("--html", html, render_benchmark(report))
    if json:
        write_json(report)
    else:
        _print_report(report)


def _parse_lengths(option: str, text: str) -> list[int]:
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


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Group
    from rich.text import Text

    from kvgen.cli.tables import log_chart, number_table

    console = terminal(sys.stdout, pipe_width=_PIPE_WIDTH)
    names = ("weight_bytes", "cache_bytes", "peak_bytes")
    weights, cache, peak = ("?" if report[name] is None else f"{report[name] / 1e6:.0f} MB" for name in names)
    memory, growth = report["memory_bandwidth"], report["growth"]

    def share(bandwidth: float | None) -> str:
        return "?" if bandwidth is None else f"{100 * bandwidth / memory:.0f} %"

    prefill_rows = [(str(r["tokens"]), f"{r['rate']:.0f}") for r in report["prefill"]]
    decode_rows = [
        (str(r["context"]), f"{r['rate']:.1f}", f"{1000 * r['seconds']:.2f}", share(r["bandwidth"]))
        for r in report["decode"]
    ]
    growth_rows = [
        (str(r["length"]), f"{1000 * r['cached']:.2f}", f"{1000 * r['uncached']:.1f}", f"{r['speedup']:.1f}x")
        for r in growth
    ]
    for line in (
        f"{report['model']}, {report['engine']}, {report['dtype']} on {report['device']}, {report['threads']} threads",
        f"weights {weights}, cache {cache} at the longest context, process peak {peak}",
        f"memory bandwidth {memory / 1e9:.1f} GB/s",
    ):
        console.print(Text(escape_controls(line)), soft_wrap=True)
    tables = Group(
        number_table(("prompt", "prefill tok/s"), prefill_rows),
        number_table(("context", "decode tok/s", "ms", "of memory bandwidth"), decode_rows),
        number_table(("length", "cached ms", "uncached ms", "speed-up"), growth_rows),
    )
    console.print(tables)
    if growth:
        points = {way: [(r["length"], 1000 * r[way]) for r in growth] for way in ("uncached", "cached")}
        console.print(Text(log_chart(points, "ms per token, by context length", console.width, log_x=True)))
