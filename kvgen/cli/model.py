"""The options that name a model and say how to compute, and loading what they name."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, get_type_hints

from kvgen.cli import options
from kvgen.cli.render import download_progress

if TYPE_CHECKING:
    from kvgen import Loaded


@dataclass(frozen=True)
class ModelOptions:
    """What every command with a model lets be chosen. Each field is an option; see `takes_model_options`."""

    model: options.Model = None
    tokenizer: options.TokenizerFile = None
    ids: options.Ids = False
    backend: options.Backend = "auto"
    dtype: options.Dtype = "auto"
    device: options.Device = "auto"
    compile: options.Compile = "auto"
    quantize: options.Quantize = "auto"
    kv_dtype: options.KVDtype = "auto"
    threads: options.Threads = None

    def load(self, *, quiet: bool) -> Loaded:
        """What `kvgen.load` returns, with a progress bar for a download."""
        import torch

        from kvgen import load

        signal.signal(signal.SIGINT, signal.default_int_handler)  # see kvgen/__main__.py
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with download_progress(quiet=quiet) as progress:
            return load(
                self.model,
                dtype=self.dtype,
                device=self.device,
                tokenizer="ids" if self.ids else self.tokenizer,
                backend=self.backend,
                compile=self.compile,
                quantize=self.quantize,
                kv_dtype=self.kv_dtype,
                progress=progress,
            )


def takes_model_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with a parameter `source: ModelOptions`: on the command line it is the options of that class.

    They stand where the parameter does. defaults: those that are other ones for this command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints, shared = (get_type_hints(owner, include_extras=True) for owner in (command, ModelOptions))
        parameters: list[Parameter] = []
        for parameter in signature(command).parameters.values():
            if parameter.name != "source":
                parameters.append(parameter.replace(annotation=hints[parameter.name]))
                continue
            for field in fields(ModelOptions):
                default, annotation = defaults.get(field.name, field.default), shared[field.name]
                parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))

        @wraps(command)
        def run(**arguments: Any) -> None:
            source = ModelOptions(**{name: arguments.pop(name) for name in shared})
            command(source=source, **arguments)

        run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
