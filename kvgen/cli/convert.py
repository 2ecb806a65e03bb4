"""`kvgen convert`: write a checkpoint for another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from kvgen.cli import options
from kvgen.cli.groups import ModelOptions
from kvgen.cli.render import print_note
from kvgen.errors import UnsupportedError


def convert(
    model: Annotated[str, Argument(metavar="MODEL", help=options.CHECKPOINT)],
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder to create; it must not exist yet.")],
    to: Annotated[Literal["x-transformers"], Option("--to", help="Library to convert for.")],
    adapter: options.Adapter = None,
    quiet: options.Quiet = False,
) -> None:
    """Convert a checkpoint and its tokenizer to a folder for another library, in float32.

    Then `kvgen compare --model DIR` tests that library's cache instead of kvgen's.
    """
    loaded = ModelOptions(model, adapter=adapter, dtype="float32", device="cpu", kernels="off").load(quiet=quiet)

    from kvgen.backends.native import NativeBackend
    from kvgen.loading.convert import convert_to_xtransformers
    from kvgen.model.decoder import Decoder

    if not isinstance(loaded.model, NativeBackend) or not isinstance(loaded.model.decoder, Decoder):
        raise UnsupportedError(f"{loaded.source}: only models that run on kvgen's own decoder can be converted")
    convert_to_xtransformers(loaded.model.decoder, loaded.tokenizer, folder)
    if not quiet:
        print_note(f"wrote {folder} for {to}")
