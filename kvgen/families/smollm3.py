"""SmolLM3: Llama, but every fourth layer does not rotate."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import (
    HF_NAMES,
    flagged_biases,
    gguf_config,
    gguf_fields,
    gguf_head_dim,
    gguf_layers,
    hf_config,
    hf_fields,
    hf_head_dim,
    hf_layers,
    sliding_windows,
)
from kvgen.families.family import Family
from kvgen.families.llama import gguf_transforms
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig

_EVERY = 4  # GGUF files do not say it; llama.cpp has it fixed


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _from_gguf(raw) if raw.format == "gguf" else _from_hf(raw)


def _from_hf(raw: RawCheckpoint) -> DecoderConfig:
    fields = hf_fields(raw)
    layers, every = hf_layers(raw), fields.count("no_rope_layer_interval", _EVERY)
    rotates = fields.get("no_rope_layers")  # 1 for a layer that does rotate, whatever the name says
    if rotates is None:
        rotates = [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(rotates, list) or not all(value in (0, 1) for value in rotates):
        raise CheckpointError(f"{fields.path}: no_rope_layers must be a list of 0 and 1")
    rotary = rotary_from_hf(fields, hf_head_dim(fields))
    slides = fields.flag("use_sliding_window", False) and fields.get("sliding_window") is not None
    return hf_config(
        raw,
        rotaries=[rotary if value else None for value in rotates],
        windows=sliding_windows(fields, [slides and not value for value in rotates]),
        tied_head=True,
        biases=flagged_biases(fields),
    )


def _from_gguf(raw: RawCheckpoint) -> DecoderConfig:
    keys = gguf_fields(raw)
    rotary = rotary_from_gguf(raw, keys, gguf_head_dim(keys))
    layers = gguf_layers(raw)
    return gguf_config(raw, rotaries=[rotary if (layer + 1) % _EVERY else None for layer in range(layers)])


FAMILY = Family("smollm3", "smollm3", read_config, HF_NAMES, gguf_transforms=gguf_transforms)
