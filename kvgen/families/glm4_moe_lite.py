"""GLM-4.7-Flash: DeepSeek-V3, with a list of which layers are dense. Its GGUF files have the architecture of V2."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import fields_of, layer_count
from kvgen.families.experts import hf_ffns
from kvgen.families.family import Family, predicts_further
from kvgen.families.glm4_moe import read_router
from kvgen.families.latent import HF_LATENT_NAMES, hf_latent_config, hf_transforms
from kvgen.model.config import DecoderConfig


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    types = fields.get("mlp_layer_types")
    if types is None:
        first = fields.whole("first_k_dense_replace", 1)
        types = ["dense" if layer < first else "sparse" for layer in range(layer_count(raw))]
    if not isinstance(types, list) or len(types) != layer_count(raw) or not {"dense", "sparse"}.issuperset(types):
        raise CheckpointError(f"{fields.path}: mlp_layer_types must have dense or sparse for each layer")
    shared = fields.whole("n_shared_experts", 0) * fields.count("moe_intermediate_size")
    sparse = [kind == "sparse" for kind in types]
    return hf_latent_config(raw, hf_ffns(raw, read_router(fields), shared=shared, sparse=sparse.__getitem__))


FAMILY = Family(
    "glm4_moe_lite", "", read_config, HF_LATENT_NAMES, hf_transforms=hf_transforms, ignores=predicts_further
)
