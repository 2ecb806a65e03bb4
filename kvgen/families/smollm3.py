"""SmolLM3: Llama without rotary positions in every fourth layer."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import (
    HF_NAMES,
    fields_of,
    flagged_biases,
    gguf_config,
    head_dim,
    hf_config,
    layer_count,
    sliding_windows,
)
from kvgen.families.family import Family
from kvgen.families.llama import gguf_transforms
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf
from kvgen.model.config import DecoderConfig

_INTERVAL = 4  # not stored in GGUF files; constant in llama.cpp


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        rotary = rotary_from_gguf(raw, fields, head_dim(raw))
        return gguf_config(raw, rotaries=[rotary if (i + 1) % _INTERVAL else None for i in range(layer_count(raw))])
    interval = fields.count("no_rope_layer_interval", _INTERVAL)
    rotates = fields.get("no_rope_layers")  # 1 for a layer that does rotate, despite the name
    if rotates is None:
        rotates = [(layer + 1) % interval != 0 for layer in range(layer_count(raw))]
    if not isinstance(rotates, list) or not all(value in (0, 1) for value in rotates):
        raise CheckpointError(f"{fields.path}: no_rope_layers must be a list of 0 and 1")
    rotary = rotary_from_hf(fields, head_dim(raw))
    slides = fields.flag("use_sliding_window", False) and fields.get("sliding_window") is not None
    return hf_config(
        raw,
        rotaries=[rotary if value else None for value in rotates],
        windows=sliding_windows(raw, lambda layer: slides and layer < len(rotates) and not rotates[layer]),
        tied_head=True,
        biases=flagged_biases(raw),
    )


FAMILY = Family("smollm3", "smollm3", read_config, HF_NAMES, gguf_transforms=gguf_transforms)
