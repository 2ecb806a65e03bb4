"""Granite 3 with mixtures of experts: the multipliers of Granite, a softmax over the chosen experts."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.experts import gguf_ffns, hf_ffns
from kvgen.families.family import Family
from kvgen.families.granite import read_scales
from kvgen.families.hybrids import read_sizes
from kvgen.families.llama import gguf_transforms
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import Router

EXPERT_NAMES = {
    "model.layers.{i}.block_sparse_moe.router.layer": "blk.{i}.ffn.router",
    "model.layers.{i}.block_sparse_moe.input_linear": "blk.{i}.ffn.experts.gate_up",
    "model.layers.{i}.block_sparse_moe.output_linear": "blk.{i}.ffn.experts.down",
}
_HF_NAMES = {**HF_NAMES, **EXPERT_NAMES}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        raw, _ = read_sizes(raw, "attention.head_count_kv")  # one for each layer if it is a Granite 4
        ffns = gguf_ffns(raw, normalize=True, shared=fields.whole("expert_shared_feed_forward_length", 0))
        return gguf_config(raw, ffns=ffns, scaled_attention=True, **read_scales(raw))
    router = Router(fields.count("num_local_experts"), fields.count("num_experts_per_tok"), scores="softmax_of_chosen")
    ffns = hf_ffns(raw, router, width="intermediate_size")
    return hf_config(raw, names=_HF_NAMES, ffns=ffns, biases=flagged_biases(raw), **read_scales(raw))


FAMILY = Family("granitemoe", "granitemoe", read_config, _HF_NAMES, gguf_transforms=gguf_transforms)
