"""ERNIE 4.5, dense: Llama with interleaved rotation."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, GATED_MLP, HF_NAMES, fields_of, gguf_config, head_dim, hf_config
from kvgen.families.family import Family
from kvgen.families.llama import gguf_transforms
from kvgen.families.rope import rotary_from_hf
from kvgen.model.config import DecoderConfig

BASE = 500_000.0  # transformers' default


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_config(raw)
    fields = fields_of(raw)
    rotary = rotary_from_hf(fields, head_dim(raw), default_base=BASE)
    biases = ATTENTION | GATED_MLP if fields.flag("use_bias", False) else frozenset()
    return hf_config(raw, rotaries=rotary, tied_head=True, biases=biases)


FAMILY = Family(
    "ernie4_5", "ernie4_5", read_config, HF_NAMES, gguf_transforms=gguf_transforms, hf_transforms=gguf_transforms
)
