"""Loading the model that the options name."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from kvgen.cli.render import download_progress

if TYPE_CHECKING:
    from kvgen import Loaded


def load_model(
    model: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    tokenizer: str | None,
    *,
    backend: str = "auto",
    compile: str = "auto",
    quantize: str = "auto",
    kv_dtype: str = "auto",
    quiet: bool,
) -> Loaded:
    """What `kvgen.load` returns, with a progress bar for a download."""
    import torch

    from kvgen import load

    signal.signal(signal.SIGINT, signal.default_int_handler)  # see kvgen/__main__.py
    if threads is not None:
        torch.set_num_threads(threads)
    with download_progress(quiet=quiet) as progress:
        return load(
            model,
            dtype=dtype,
            device=device,
            tokenizer=tokenizer,
            backend=backend,
            compile=compile,
            quantize=quantize,
            kv_dtype=kv_dtype,
            progress=progress,
        )
