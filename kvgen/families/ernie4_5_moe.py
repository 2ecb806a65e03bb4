"""ERNIE 4.5 with mixtures of experts: a softmax router with a bias for choosing, interleaved rotation."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, GATED_MLP, HF_NAMES, fields_of, gguf_config, head_dim, hf_config, layer_count
from kvgen.families.ernie4_5 import BASE
from kvgen.families.experts import HF_EXPERT_NAMES, SHARED_EXPERT, as_vector, gguf_ffns, hf_ffns
from kvgen.families.family import Family, Transforms
from kvgen.families.llama import gguf_transforms
from kvgen.families.rope import rotary_from_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE, Router

_HF_NAMES = {
    **HF_NAMES,
    **HF_EXPERT_NAMES,
    "model.layers.{i}.mlp.moe_statics.e_score_correction_bias": "blk.{i}.ffn.router.selection.bias",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        shared = fields.whole("expert_shared_feed_forward_length", 0)
        return gguf_config(raw, ffns=gguf_ffns(raw, normalize=True, shared=shared, selection_bias=True))
    rotary = rotary_from_hf(fields, head_dim(raw), default_base=BASE)
    biases = ATTENTION | GATED_MLP | SHARED_EXPERT if fields.flag("use_bias", False) else frozenset()
    return hf_config(raw, names=_HF_NAMES, rotaries=rotary, tied_head=True, ffns=_read_ffns(raw), biases=biases)


def _read_ffns(raw: RawCheckpoint) -> list[MLP | MoE]:
    fields = fields_of(raw)
    first, step = fields.whole("moe_layer_start_index", 1), fields.count("moe_layer_interval", 1)
    end = "moe_layer_end_index"
    last = layer_count(raw) - 1 if fields.get(end) in (None, -1) else fields.whole(end)
    router = Router(
        experts=fields.count("moe_num_experts", fields.optional_count("num_experts")),
        active=fields.count("moe_k", fields.optional_count("num_experts_per_tok")),
        normalize=True,
        smallest_sum=fields.number("moe_norm_min", 1e-12),
        selection_bias=True,
    )
    shared = fields.whole("moe_num_shared_experts", 2) * fields.count("moe_intermediate_size")
    return hf_ffns(raw, router, shared=shared, sparse=lambda i: first <= i <= last and (i + 1) % step == 0)


def transforms(config: DecoderConfig) -> Transforms:
    """The bias for choosing is a matrix of one row, in GGUF files too."""
    return {**gguf_transforms(config), "ffn.router.selection": as_vector}


FAMILY = Family(
    "ernie4_5_moe",
    "ernie4_5-moe",
    read_config,
    _HF_NAMES,
    gguf_transforms=transforms,
    hf_transforms=transforms,
    ignores=lambda name, config: name.startswith("model.mtp_"),  # predict further tokens
)
