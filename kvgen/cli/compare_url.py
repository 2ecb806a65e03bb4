"""`kvgen compare --url`: check the cache of a server that is already running."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from kvgen.cli.errors import exiting_with
from kvgen.cli.interrupts import raise_interrupts
from kvgen.cli.render import check_file, escape_controls, terminal, write_file, write_json
from kvgen.cli.tables import number_table
from kvgen.errors import UsageError

if TYPE_CHECKING:
    from kvgen.comparison.servers.client import Client
    from kvgen.comparison.servers.comparison import ServerComparison

_option = partial(Option, rich_help_panel="A running server")
_KINDS = ("llama.cpp", "vllm", "sglang", "kvgen", "openai")  # repeated: importing is slow
_STYLES = {"equivalent": "green", "different": "bold red"}
_PIPE_WIDTH = 110
_LIMITS = {False: (400, 300.0), True: (2000, 1800.0)}  # requests and seconds, by --thorough
_PROBING = 45.0  # seconds of the default; a cause of differences is looked for after them


def complete_kind(incomplete: str) -> list[str]:
    """Complete kinds of servers in the shell."""
    return [kind for kind in _KINDS if kind.startswith(incomplete)]


@dataclass(frozen=True)
class ServerOptions:
    """Options of `kvgen compare` for a running server."""

    url: Annotated[
        str | None, _option(metavar="URL", help="Compare the model that a running server serves, over HTTP.")
    ] = None
    server_kind: Annotated[
        str | None,
        _option(
            metavar="KIND",
            help=f"Kind of server: {', '.join(_KINDS)}.",
            show_default="found out",
            autocompletion=complete_kind,
        ),
    ] = None
    api_key_env: Annotated[
        str | None, _option(metavar="NAME", help="Environment variable that holds the server's API key.")
    ] = None
    timeout: Annotated[float, _option(min=0.1, help="Seconds to wait for an answer.")] = 60
    max_requests: Annotated[
        int | None, _option(min=1, help="Largest number of requests.", show_default="400; thorough: 2000")
    ] = None
    max_seconds: Annotated[
        float | None,
        _option(
            min=1,
            help="Start no request after this time.",
            show_default=f"{_PROBING:g}, and up to 300 for finding a cause; thorough: 1800",
        ),
    ] = None

    def check(self) -> None:
        """Raise UsageError for options of a server without --url."""
        given = [name for name in ("server_kind", "api_key_env", "max_requests", "max_seconds") if getattr(self, name)]
        if self.url is None and given:
            raise UsageError(f"--{given[0].replace('_', '-')} needs --url")


def compare_url(
    options: ServerOptions, prompt: str, *, steps: int, thorough: bool, json: bool, junit: Path | None, quiet: bool
) -> None:
    """Compare a server's cached answers with uncached ones, print the result, and exit with its code."""
    from kvgen.comparison.servers.client import Client
    from kvgen.comparison.servers.comparison import compare_server
    from kvgen.comparison.servers.connect import connect
    from kvgen.comparison.servers.report import as_data

    assert options.url is not None
    raise_interrupts()
    if junit is not None:
        check_file("--junit", junit)
    requests, seconds = _LIMITS[thorough]
    client = Client(
        options.url,
        key_variable=options.api_key_env,
        timeout=options.timeout,
        max_requests=options.max_requests or requests,
        max_seconds=options.max_seconds or seconds,
    )
    try:
        with _progress(client, quiet=quiet) as show:
            server = connect(client, options.server_kind)
            result = compare_server(
                client,
                server,
                prompt,
                steps=steps,
                thorough=thorough,
                seconds=math.inf if thorough or options.max_seconds else _PROBING,
                progress=show,
            )
    finally:
        client.close()
    if junit is not None:
        from kvgen.comparison.junit import as_junit

        write_file("--junit", junit, as_junit(as_data(result)))
    with exiting_with(0 if result.acceptable else 1):
        if json:
            write_json(as_data(result))
        else:
            print_server_comparison(result)


@contextmanager
def _progress(client: Client, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal how many probes are done, and how many requests were made."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with terminal(sys.stderr).status(f"comparing: asking {escape_controls(client.url)}") as shown:
        yield lambda done, total: shown.update(f"comparing: {done} of {total} probes, {client.requests} requests")


def print_server_comparison(result: ServerComparison) -> None:
    """Print verdict, table of probes and findings on stdout."""
    from rich.text import Text

    console = terminal(sys.stdout, pipe_width=_PIPE_WIDTH)
    head = Text(f"{result.server}: ").append(result.verdict.value, _STYLES.get(result.verdict.value, "yellow"))
    console.print(head.append(f"   {result.reason}" if result.reason else ""), soft_wrap=True)
    texts = f"prompts of {result.length} tokens, {result.steps} steps; " if result.length else ""
    model = f"{result.model} at " if result.model else ""
    summary = f"{model}{result.url}; {texts}{result.requests} requests in {result.seconds:.0f} s."
    console.print(Text(escape_controls(summary), style="dim"))
    rows = [
        (
            probe.name,
            Text(
                f"{probe.verdict.value}{' (near-tie)' if probe.near_tie else ''}", _STYLES.get(probe.verdict, "yellow")
            ),
            str(probe.length),
            "?" if probe.reused is None else str(probe.reused),
            f"{probe.distance:.2g}",
            f"{probe.noise:.2g}",
        )
        for probe in result.probes
    ]
    if rows:
        titles = ("probe", "verdict", "tokens", "reused", "difference", "noise")
        console.print(number_table(titles, rows, left=2))
    for probe in result.probes:
        if probe.note:
            console.print(Text(f"{probe.name}: ", "bold").append(escape_controls(f"{probe.note}."), "not bold"))
    for finding in result.findings:
        evidence = Text(f" ({escape_controls(finding.evidence)})", "dim") if finding.evidence else Text()
        console.print(Text(escape_controls(finding.text)).append_text(evidence))
    if result.not_tested:
        console.print(Text(f"Not tested: {result.not_tested}.", style="dim"))
