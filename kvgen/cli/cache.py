"""`kvgen cache`: describe prompt-cache files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from kvgen.cli import options
from kvgen.cli.commands import Command, Group
from kvgen.cli.render import format_bytes, write_json
from kvgen.cli.tables import print_facts

cache = typer.Typer(
    add_completion=False,
    cls=Group,
    help="Describe prompt-cache files.",
    epilog="Example:\n\nkvgen cache inspect article.cache",
)


@cache.callback()
def _subcommands() -> None:
    """Without a callback, Typer would make `inspect` the command itself."""


@cache.command(cls=Command, epilog="Example:\n\nkvgen cache inspect article.cache --json")
def inspect(
    file: Annotated[Path, Argument(metavar="FILE", help="A file written with --prompt-cache.")],
    json: options.Json = False,
) -> None:
    """Show a prompt cache's model, number of tokens and size."""
    from kvgen.generation.prompt_cache import describe_prompt_cache

    info = describe_prompt_cache(file)
    if json:
        write_json(asdict(info))
        return
    print_facts(
        [
            ("model", info.model),
            ("arithmetic", info.numerics),
            ("tokens", f"{len(info.tokens):,}"),
            ("layers", str(info.layers)),
            ("keys, values", f"{info.dtype}, {format_bytes(info.nbytes)}"),
        ]
    )
