"""GLM-4.5 to 4.7: mixtures of experts chosen with a bias and in groups, a shared expert, the first layers dense."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, HF_QK_NORM_NAMES, fields_of, flagged_biases, gguf_config, hf_config, read_size
from kvgen.families.experts import HF_EXPERT_NAMES, after_first, gguf_ffns, hf_ffns
from kvgen.families.family import GGUF_NORM_NAMES, Family, predicts_further
from kvgen.families.fields import Fields
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE, Router

HF_NAMES_WITH_QK_NORM = {**HF_NAMES, **HF_EXPERT_NAMES, **HF_QK_NORM_NAMES}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        has_norm, ffns = "blk.0.attn_q_norm.weight" in raw.tensors, read_gguf_ffns(raw)
        return gguf_config(raw, names=GGUF_NORM_NAMES, ffns=ffns, attention={"qk_norm": "head" if has_norm else None})
    return hf_config(
        raw,
        names=HF_NAMES_WITH_QK_NORM,
        rotary_share=0.5,
        ffns=read_hf_ffns(raw),
        attention={"qk_norm": "head" if fields.flag("use_qk_norm", False) else None},
        biases=flagged_biases(raw) - {"attn.output"},
    )


def read_hf_ffns(raw: RawCheckpoint) -> list[MLP | MoE]:
    fields = fields_of(raw)
    shared = fields.whole("n_shared_experts", 0) * fields.count("moe_intermediate_size")
    return hf_ffns(raw, read_router(fields), shared=shared, sparse=after_first(fields, "first_k_dense_replace"))


def read_router(fields: Fields) -> Router:
    """Read the router of DeepSeek-V3 and its descendants (arXiv:2412.19437, section 2.1.2)."""
    return Router(
        experts=fields.count("n_routed_experts"),
        active=fields.count("num_experts_per_tok"),
        scores="sigmoid",
        normalize=fields.flag("norm_topk_prob", False),
        scale=fields.number("routed_scaling_factor", 1.0),
        selection_bias=True,
        groups=fields.count("n_group", 1),
        active_groups=fields.count("topk_group", 1),
        group_top=2,
    )


def read_gguf_ffns(raw: RawCheckpoint) -> list[MLP | MoE]:
    keys = fields_of(raw)
    width = keys.count("expert_feed_forward_length", read_size(raw, "ffn_width"))
    shared = keys.whole("expert_shared_count", 0) * width
    return gguf_ffns(raw, scores="sigmoid", normalize=False, shared=shared, selection_bias=True)


FAMILY = Family(
    "glm4_moe", "glm4moe", read_config, HF_NAMES_WITH_QK_NORM, gguf_names=GGUF_NORM_NAMES, ignores=predicts_further
)
