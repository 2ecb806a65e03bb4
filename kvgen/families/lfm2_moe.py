"""LFM2 with mixtures of experts, LFM2-8B-A1B: chosen by a sigmoid with a bias; the first layers are dense."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import fields_of
from kvgen.families.experts import expert_names, gguf_ffns, hf_ffns
from kvgen.families.family import Family
from kvgen.families.lfm2 import GGUF_CONV_NAMES, HF_NAMES, hf_transforms, read_gguf, read_hf
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import Router

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.feed_forward.gate": "blk.{i}.ffn.router",
    "model.layers.{i}.feed_forward.expert_bias": "blk.{i}.ffn.router.selection.bias",
    **expert_names("model.layers.{i}.feed_forward.experts", "w1", "w3", "w2"),
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":
        return read_gguf(raw, ffns=gguf_ffns(raw, scores="sigmoid", normalize=True, selection_bias=True))
    fields = fields_of(raw)
    router = Router(
        experts=fields.count("num_experts"),
        active=fields.count("num_experts_per_tok"),
        scores="sigmoid",
        normalize=fields.flag("norm_topk_prob", True),
        added_to_sum=1e-6,
        scale=fields.number("routed_scaling_factor", 1.0),
        selection_bias=fields.flag("use_expert_bias", True),
    )
    dense = fields.whole("num_dense_layers", 2)
    raw = raw.with_metadata({"hidden_act": "silu"})  # fixed in transformers
    return read_hf(raw, _HF_NAMES, ffns=hf_ffns(raw, router, sparse=lambda layer: layer >= dense))


FAMILY = Family("lfm2_moe", "lfm2moe", read_config, _HF_NAMES, gguf_names=GGUF_CONV_NAMES, hf_transforms=hf_transforms)
