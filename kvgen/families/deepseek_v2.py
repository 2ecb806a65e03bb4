"""DeepSeek-V2 and V2-Lite: latent attention; softmax scores, of experts in groups or not, the first layers dense.

GGUF files of DeepSeek-V3 and of GLM-4.7-Flash are of this architecture as well.
"""

from __future__ import annotations

from dataclasses import replace

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import UnsupportedError
from kvgen.families.base import fields_of
from kvgen.families.experts import after_first, gguf_ffns, hf_ffns
from kvgen.families.family import Family, predicts_further
from kvgen.families.fields import Fields
from kvgen.families.latent import (
    GGUF_LATENT_NAMES,
    HF_LATENT_NAMES,
    gguf_latent_config,
    gguf_transforms,
    hf_latent_config,
    hf_transforms,
)
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE, Router, Scores


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return gguf_latent_config(raw, _read_gguf_ffns(raw))
    fields = fields_of(raw)
    for name, supported in (("scoring_func", "softmax"), ("norm_topk_prob", False), ("moe_layer_freq", 1)):
        fields.require(name, supported)
    shared = fields.whole("n_shared_experts", 0) * fields.count("moe_intermediate_size")
    sparse = after_first(fields, "first_k_dense_replace")
    return hf_latent_config(raw, hf_ffns(raw, _read_router(fields), shared=shared, sparse=sparse))


def _read_router(fields: Fields) -> Router:
    """DeepSeek-V2, section 2.2.2: of a group, the best expert counts."""
    router = Router(
        experts=fields.count("n_routed_experts"),
        active=fields.count("num_experts_per_tok"),
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    method = fields.get("topk_method")
    if method in (None, "greedy"):
        return router
    if method != "group_limited_greedy":
        raise UnsupportedError(f"{fields.path}: topk_method {method!r:.80} is not supported")
    return replace(router, groups=fields.count("n_group"), active_groups=fields.count("topk_group"))


def _read_gguf_ffns(raw: RawCheckpoint) -> list[MLP | MoE]:
    """Read the feed-forward layers. Some files do not say that scores are sigmoids: those of models with a bias are."""
    keys = fields_of(raw)
    biased = any(".exp_probs_b." in name for name in raw.tensors)
    shared = keys.whole("expert_shared_count", 0) * keys.count("expert_feed_forward_length")
    scores: Scores = "sigmoid" if biased else "softmax"
    return gguf_ffns(raw, scores=scores, normalize=False, shared=shared, selection_bias=biased)


FAMILY = Family(
    "deepseek_v2",
    "deepseek2",
    read_config,
    HF_LATENT_NAMES,
    gguf_names=GGUF_LATENT_NAMES,
    gguf_transforms=gguf_transforms,
    hf_transforms=hf_transforms,
    ignores=predicts_further,
)
