"""Caches of the transformers library: which it has, and one with what it was computed from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache, cache_utils
from transformers.generation import configuration_utils


def cache_names() -> dict[str, dict[str, Any]]:
    """The caches of the installed library by name: the settings of `generate` that choose each."""
    names = set(configuration_utils.ALL_CACHE_IMPLEMENTATIONS)
    names -= {"quantized", *configuration_utils.DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS}
    backends = [name.removesuffix("QuantizedLayer").lower() for name in dir(cache_utils)]
    return {
        "auto": {},
        **{name: {"cache_implementation": name} for name in sorted(names)},
        **{
            f"quantized-{backend}": {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
            for backend, name in zip(backends, dir(cache_utils), strict=True)
            if name.endswith("QuantizedLayer") and not inspect.isabstract(getattr(cache_utils, name))
        },
    }


@dataclass
class TransformersCache:
    """A cache of the library, which each call writes into.

    state: the cache by the name of the model's argument; empty if the model returned none. ids: what it was computed
    from, (B, n). room: positions that it has been made for; None: any number.
    reused, computed: positions that the last call found in the cache, and those that it computed.
    """

    state: dict[str, Any]
    ids: Tensor
    room: int | None = None
    reused: int = 0
    computed: int = 0

    @property
    def empty(self) -> bool:
        """Whether no model has written into it: some ignore the cache that they are given."""
        stored = next(iter(self.state.values()), None)
        if isinstance(stored, EncoderDecoderCache):
            stored = stored.self_attention_cache
        if isinstance(stored, Cache):  # a layer gets its device with its first entry
            return all(getattr(layer, "device", None) is None for layer in stored.layers)
        return stored is None
