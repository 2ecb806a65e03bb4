"""Arcee (AFM): Llama with a plain MLP of squared ReLUs."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, HF_NAMES, PLAIN_MLP, fields_of, gguf_config, hf_config
from kvgen.families.family import Family
from kvgen.families.llama import gguf_transforms
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw, gated=False, activation="relu2")
    fields = fields_of(raw)
    biases = ATTENTION if fields.flag("attention_bias", False) else frozenset()
    return hf_config(raw, gated=False, biases=biases | (PLAIN_MLP if fields.flag("mlp_bias", False) else frozenset()))


FAMILY = Family("arcee", "arcee", read_config, HF_NAMES, gguf_transforms=gguf_transforms)
