"""OLMoE: mixtures of experts, and norms on all queries and keys."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, HF_QK_NORM_NAMES, fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.experts import HF_EXPERT_NAMES, gguf_ffns, hf_ffns
from kvgen.families.family import Family
from kvgen.families.qwen3_moe import read_router
from kvgen.model.config import DecoderConfig

_HF_NAMES = {**HF_NAMES, **HF_EXPERT_NAMES, **HF_QK_NORM_NAMES}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        return gguf_config(raw, attention={"qk_norm": "all"}, ffns=gguf_ffns(raw, normalize=False))
    fields.require("clip_qkv", None)
    ffns, biases = hf_ffns(raw, read_router(fields), width="intermediate_size"), flagged_biases(raw)
    return hf_config(raw, names=_HF_NAMES, ffns=ffns, attention={"qk_norm": "all"}, biases=biases)


FAMILY = Family("olmoe", "olmoe", read_config, _HF_NAMES)
