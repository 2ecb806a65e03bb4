"""Model families as data: how to read a checkpoint's config and tensors for the one decoder."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.family import Family
from kvgen.families.refused import experts_field, is_state_space, refusal

__all__ = ["FAMILIES", "Family", "find_family"]

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
FAMILIES: tuple[Family, ...] = tuple(module.FAMILY for module in _MODULES if hasattr(module, "FAMILY"))
"""The families of all modules in this folder."""


def find_family(raw: RawCheckpoint) -> Family:
    """Return the family that a GGUF file or a Hugging Face config names. Raises UnsupportedError if there is none."""
    is_gguf = raw.format == "gguf"
    key = "general.architecture" if is_gguf else "model_type"
    name = raw.metadata.get(key)
    if not isinstance(name, str):
        raise CheckpointError(f"{raw.path}: {key} is missing, so the kind of model is unknown")
    kind = refusal(name, raw.metadata)
    if kind is not None:
        raise UnsupportedError(f"{raw.path}: {key} {name!r} is {kind}; kvgen runs decoder-only models")
    families = {family.gguf_architecture if is_gguf else family.hf_model_type: family for family in FAMILIES}
    if not name or name not in families:
        experts = experts_field(raw.metadata, f"{name}.")
        mixture = f", a mixture of experts ({experts})," if experts else ""
        if is_state_space(name, raw.metadata):
            mixture = ", a state-space or recurrent model,"
        known = ", ".join(sorted(families.keys() - {""}))
        raise UnsupportedError(f"{raw.path}: {key} {name!r}{mixture} is not supported (kvgen has: {known})")
    return families[name].variant(raw) or families[name]
