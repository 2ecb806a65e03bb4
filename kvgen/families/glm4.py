"""GLM-4-0414: norms before and after each part, half of each head rotated in pairs of neighbours."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, QKV, fields_of, gguf_config, hf_config
from kvgen.families.family import GGUF_NAMES, Family, Transform
from kvgen.families.gemma2 import NORMS
from kvgen.families.llama import gguf_transforms
from kvgen.model.config import DecoderConfig

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.post_self_attn_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.post_mlp_layernorm": "blk.{i}.post_ffw_norm",
    "model.layers.{i}.mlp.gate_up_proj": "blk.{i}.ffn.gate_up",
}
_GGUF_NAMES = {**GGUF_NAMES, "blk.{i}.ffn_up": "blk.{i}.ffn.gate_up"}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    shared: dict[str, Any] = {"norms": NORMS}
    if raw.format == "gguf":
        return gguf_config(raw, **shared, names=_GGUF_NAMES)
    biased = fields_of(raw).flag("attention_bias", True)
    biases = QKV if biased else frozenset()
    return hf_config(raw, **shared, names=_HF_NAMES, rotary_share=0.5, biases=biases)


def transforms(config: DecoderConfig) -> dict[str, Transform]:
    """Rotation is interleaved in both formats."""
    return gguf_transforms(config, rotated=2 * len(config.rotaries[0].inverse_frequencies))


FAMILY = Family(
    "glm4", "glm4", read_config, _HF_NAMES, _GGUF_NAMES, hf_transforms=transforms, gguf_transforms=transforms
)
