"""Other libraries' models as subjects of a comparison. One file per engine: its backend, its subject, its `load`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from kvgen.errors import UnsupportedError, UsageError
from kvgen.hub.catalogue import Progress
from kvgen.hub.names import default_reference, no_progress, resolve
from kvgen.loading.load import Loaded

ENGINES = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
"""The module in this package of each engine, which imports its library; `load(path, options)` returns a `Loaded`."""

_EXTRAS = {"transformers": "transformers", "llama_cpp": "llama-cpp"}


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes. An engine raises UsageError for what it does not know, and names what it does.

        >>> kvgen.EngineOptions(cache="static").attention
        'auto'

    cache: which of the library's caches; `auto`: the one that it chooses itself. attention: which of its
    implementations; `auto` likewise. dtype, kv_dtype, device: as `kvgen.load`. tokenizer: likewise; None: the
    checkpoint's own.
    """

    cache: str = "auto"
    attention: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    device: str = "auto"
    tokenizer: str | Path | None = None

    def check(self, engine: str, **known: Collection[str]) -> None:
        """Raise UsageError for an option whose value is not among those that the engine has."""
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise UsageError(f"{name} {value!r} is not one that {engine} has: {', '.join(values)}")


def load_engine(
    engine: str,
    reference: str | Path | None = None,
    options: EngineOptions = EngineOptions(),
    progress: Progress = no_progress,
) -> Loaded:
    """Load a checkpoint in another library, to compare its cached decoding with its uncached decoding.

        >>> kvgen.load_engine("other", "smollm2")
        Traceback (most recent call last):
        kvgen.errors.UsageError: unknown backend 'other'; known: native, transformers, llama.cpp

    reference: a file, a folder, a catalogue name or a hub id, as `kvgen.load`; code in a checkpoint never runs.

    Raises UsageError for an unknown engine or option, UnsupportedError if the library is missing or refuses the
    checkpoint, NotFoundError, CheckpointError.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown backend {engine!r}; known: native, {', '.join(ENGINES)}")
    module = ENGINES[engine]
    path = resolve(str(reference or default_reference()), progress=progress)
    try:
        loader = import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvgen"):
            raise
        extra = _EXTRAS[module]
        raise UnsupportedError(f"backend {engine} needs {error.name}: pip install 'kvgen[{extra}]'") from None
    loaded: Loaded = loader.load(path, options)
    return loaded
