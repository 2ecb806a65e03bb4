"""`kvgen convert`: write a checkpoint for another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from kvgen.cli import options
from kvgen.cli.model import ModelOptions
from kvgen.cli.render import print_note
from kvgen.errors import UnsupportedError


def convert(
    model: Annotated[str, Argument(metavar="MODEL", help=options.CHECKPOINT)],
    folder: Annotated[Path, Argument(metavar="DIR", help="The folder to write; it must not exist.")],
    to: Annotated[Literal["x-transformers"], Option("--to", help="The library that is to run it.")],
    quiet: options.Quiet = False,
) -> None:
    """Write a checkpoint as a folder that another library runs, in float32, with its tokenizer.

    Then `kvgen compare --model DIR` checks the cache of that library, not kvgen's.
    """
    loaded = ModelOptions(model, dtype="float32", device="cpu", kernels="off").load(quiet=quiet)

    from kvgen.backends.native import NativeBackend
    from kvgen.loading.convert import convert_to_xtransformers
    from kvgen.model.decoder import Decoder

    if not isinstance(loaded.model, NativeBackend) or not isinstance(loaded.model.decoder, Decoder):
        raise UnsupportedError(f"{loaded.source}: only models of the native backend can be converted")
    convert_to_xtransformers(loaded.model.decoder, loaded.tokenizer, folder)
    if not quiet:
        print_note(f"wrote {folder} for {to}")
