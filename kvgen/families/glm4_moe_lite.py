"""GLM-4.7-Flash: DeepSeek-V3, with a list of which layers are dense. Its GGUF files have the architecture of V2."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import fields_of, layer_count
from kvgen.families.experts import hf_ffns
from kvgen.families.family import Family, predicts_further
from kvgen.families.glm4_moe import read_router
from kvgen.families.hybrids import read_layer_kinds
from kvgen.families.latent import HF_LATENT_NAMES, hf_latent_config, hf_transforms
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields, count = fields_of(raw), layer_count(raw)
    first = fields.whole("first_k_dense_replace", 1)
    default = ["dense" if layer < first else "sparse" for layer in range(count)]
    kinds = read_layer_kinds(fields, count, ("dense", "sparse"), default, "mlp_layer_types")
    shared = fields.whole("n_shared_experts", 0) * fields.count("moe_intermediate_size")
    sparse = [kind == "sparse" for kind in kinds]
    return hf_latent_config(raw, hf_ffns(raw, read_router(fields), shared=shared, sparse=sparse.__getitem__))


FAMILY = Family(
    "glm4_moe_lite", "", read_config, HF_LATENT_NAMES, hf_transforms=hf_transforms, ignores=predicts_further
)
