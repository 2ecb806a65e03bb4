"""`kvgen cache`: prompt caches, the files that `--prompt-cache` writes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text
from typer import Argument

from kvgen.cli import options
from kvgen.cli.errors import Group
from kvgen.cli.escape import escape_controls
from kvgen.cli.help import Command
from kvgen.cli.render import format_bytes, terminal, write_json

cache = typer.Typer(
    cls=Group,
    help="Look into prompt caches.",
    epilog="Example:\n\nkvgen cache inspect article.cache",
)


@cache.callback()
def _commands() -> None:
    """Keeps `inspect` a command of its own."""


@cache.command(cls=Command, epilog="Example:\n\nkvgen cache inspect article.cache --json")
def inspect(
    file: Annotated[Path, Argument(metavar="FILE", help="What --prompt-cache wrote.")], json: options.Json = False
) -> None:
    """Say what a prompt cache holds: of which model, how many tokens, how many bytes."""
    from kvgen.generation.prompt_cache import describe_prompt_cache

    info = describe_prompt_cache(file)
    if json:
        write_json(asdict(info))
        return
    rows = {
        "model": info.model,
        "arithmetic": info.numerics,
        "tokens": f"{len(info.tokens):,}",
        "layers": str(info.layers),
        "keys, values": f"{info.dtype}, {format_bytes(info.nbytes)}",
    }
    console = terminal(sys.stdout)
    for name, value in rows.items():
        console.print(Text(f"{name:<14}{escape_controls(value)}"), soft_wrap=True)
