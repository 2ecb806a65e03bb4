"""Gemma 1: embeddings scaled by sqrt(dim), norms that multiply by 1 + w, a GELU gate, a tied head."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, gguf_config, hf_config, read_size
from kvgen.families.family import Family, Transform, plus_one
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    scale = embedding_scale(raw)
    if raw.format == "gguf":
        return gguf_config(raw, activation="gelu_tanh", embedding_scale=scale)
    fields_of(raw).require("use_bidirectional_attention", False)
    biases = flagged_biases(raw)
    # These config.json files name the exact GELU but mean the tanh approximation (see transformers).
    return hf_config(raw, tied_head=True, activation="gelu_tanh", embedding_scale=scale, biases=biases)


def embedding_scale(raw: RawCheckpoint) -> float:
    return float(read_size(raw, "dim") ** 0.5)


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    """Norms multiply by 1 + w. llama.cpp's converter has already added the 1."""
    names = config.norms | {"output_norm"} | ({"attn.q_norm", "attn.k_norm"} if config.attention.qk_norm else set())
    return dict.fromkeys(names, plus_one)


FAMILY = Family("gemma", "gemma", read_config, HF_NAMES, hf_transforms=hf_transforms)
