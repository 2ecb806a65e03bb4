"""The options that name a model and say how to compute, and loading what they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvgen.cli import options
from kvgen.cli.interrupts import raise_interrupts
from kvgen.cli.render import download_progress

if TYPE_CHECKING:
    from kvgen import Loaded


@dataclass(frozen=True)
class ModelOptions:
    """What every command with a model lets be chosen. Each field is an option; see `kvgen.cli.groups`."""

    model: options.Model = None
    tokenizer: options.TokenizerFile = None
    ids: options.Ids = False
    backend: options.Backend = "auto"
    dtype: options.Dtype = "auto"
    device: options.Device = "auto"
    kernels: options.Kernels = "auto"
    quantize: options.Quantize = "auto"
    kv_dtype: options.KVDtype = "auto"
    threads: options.Threads = None

    def load(self, *, quiet: bool) -> Loaded:
        """What `kvgen.load` returns, with a progress bar for a download."""
        import torch

        from kvgen import load

        raise_interrupts()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with download_progress(quiet=quiet) as progress:
            return load(**self.arguments(), progress=progress)

    def arguments(self) -> dict[str, Any]:
        """What `kvgen.load` is to be called with."""
        return {
            "reference": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "tokenizer": "ids" if self.ids else self.tokenizer,
            "backend": self.backend,
            "kernels": self.kernels,
            "quantize": self.quantize,
            "kv_dtype": self.kv_dtype,
        }
