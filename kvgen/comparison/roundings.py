"""kvgen on a checkpoint with weights, activations or cached values rounded, to measure what that does to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvgen.contract import Backend
from kvgen.errors import KvgenError
from kvgen.loading.load import load

Roundings = Callable[[], Iterator[tuple[str, str, Backend]]]
"""The kind of what is rounded, words for it, and the model. The first one is exact."""


def roundings(source: str) -> Iterator[tuple[str, str, Backend]]:
    """Load each in turn; none if kvgen does not run the checkpoint. See `Roundings`."""
    chosen: list[tuple[str, str, Mapping[str, Any]]] = [
        ("exact", "", {"quantize": "none"}),
        ("order of sums", "sums in another order, which this model enlarges", {"quantize": "none", "kernels": "off"}),
        ("arithmetic", "activations rounded to 16 bits", {}),
        ("arithmetic", "activations rounded to 8 bits", {"activations": "int8"}),
        ("arithmetic", "keys and values rounded to 16 bits", {"quantize": "none", "kv_dtype": "bfloat16"}),
        ("arithmetic", "keys and values rounded to 8 bits", {"quantize": "none", "kv_dtype": "int8"}),
        ("weights", "weights rounded to bfloat16", {"dtype": "bfloat16"}),
        ("weights", "weights rounded to 8 bits", {"quantize": "int8"}),
        ("weights", "weights rounded to 4 bits", {"quantize": "int4"}),
    ]
    for kind, words, options in chosen:
        try:
            yield kind, words, load(source, tokenizer="ids", device="cpu", **{"dtype": "float32", **options}).model
        except KvgenError:  # another engine may run what kvgen does not
            if kind == "exact":
                return
