"""Model families as data: how each one's checkpoints become a decoder config and the decoder's parameters."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families import llama
from kvgen.families.family import Family

__all__ = ["FAMILIES", "Family", "find_family"]

FAMILIES: tuple[Family, ...] = (llama.FAMILY,)


def find_family(raw: RawCheckpoint) -> Family:
    """The family that a checkpoint says it is of. Raises UnsupportedError if kvgen does not have it."""
    key = "general.architecture" if raw.format == "gguf" else "model_type"
    name = raw.metadata.get(key)
    if not isinstance(name, str):
        raise CheckpointError(f"{raw.path}: {key} is missing, so the kind of model is unknown")
    for family in FAMILIES:
        if name == (family.gguf_architecture if raw.format == "gguf" else family.hf_model_type):
            return family
    known = ", ".join(family.hf_model_type for family in FAMILIES)
    raise UnsupportedError(f"{raw.path}: {key} {name!r} is not supported (kvgen has: {known})")
