"""Model families as data: how each one's checkpoints become a decoder config and the decoder's parameters."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo2,
    phi,
    phi3,
    qwen2,
    qwen3,
    smollm3,
    stablelm,
    starcoder2,
    xtransformers,
)
from kvgen.families.family import Family
from kvgen.families.refused import refusal

__all__ = ["FAMILIES", "Family", "find_family", "runs_natively"]

FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY
    for module in (
        llama,
        mistral,
        qwen2,
        qwen3,
        gemma,
        gemma2,
        gemma3,
        gpt2,
        gpt_neox,
        phi,
        phi3,
        olmo2,
        smollm3,
        granite,
        starcoder2,
        stablelm,
    )
)


def find_family(raw: RawCheckpoint) -> Family:
    """The family that a checkpoint says it is of. Raises UnsupportedError if kvgen does not have it."""
    if raw.format == "x-transformers":
        return xtransformers.FAMILY
    key = "general.architecture" if raw.format == "gguf" else "model_type"
    name = raw.metadata.get(key)
    if not isinstance(name, str):
        raise CheckpointError(f"{raw.path}: {key} is missing, so the kind of model is unknown")
    kind = refusal(name, raw.metadata)
    if kind is not None:
        raise UnsupportedError(f"{raw.path}: {key} {name!r} is {kind}; kvgen runs dense decoder-only models")
    for family in FAMILIES:
        if name and name == (family.gguf_architecture if raw.format == "gguf" else family.hf_model_type):
            return family
    known = ", ".join(
        sorted({f.gguf_architecture if raw.format == "gguf" else f.hf_model_type for f in FAMILIES} - {""})
    )
    raise UnsupportedError(f"{raw.path}: {key} {name!r} is not supported (kvgen has: {known})")


def runs_natively(raw: RawCheckpoint) -> bool:
    """Whether the native decoder has all mechanisms of a checkpoint that another library wrote."""
    return raw.format != "x-transformers" or xtransformers.obstacle(raw.metadata) is None
