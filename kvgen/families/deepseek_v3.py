"""DeepSeek-V3 and R1: latent attention; experts in groups, scored by sigmoids, chosen with a bias; first layers dense.

Its GGUF files have the architecture of DeepSeek-V2.
"""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import fields_of
from kvgen.families.family import Family, predicts_further
from kvgen.families.glm4_moe import read_hf_ffns
from kvgen.families.latent import HF_LATENT_NAMES, hf_latent_config, hf_transforms
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    for name, supported in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        fields.require(name, supported)
    return hf_latent_config(raw, read_hf_ffns(raw))


FAMILY = Family("deepseek_v3", "", read_config, HF_LATENT_NAMES, hf_transforms=hf_transforms, ignores=predicts_further)
