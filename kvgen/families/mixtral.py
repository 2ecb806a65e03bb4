"""Mixtral: Mistral with mixtures of experts. GGUF files call it `llama`."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, hf_config
from kvgen.families.experts import HF_EXPERT_NAMES, expert_names, hf_ffns
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import Router

_HF_NAMES = {
    **HF_NAMES,
    **HF_EXPERT_NAMES,
    "model.layers.{i}.block_sparse_moe.gate": "blk.{i}.ffn.router",
    **expert_names("model.layers.{i}.block_sparse_moe.experts", "w1", "w3", "w2"),
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    experts = fields.count("num_local_experts", fields.optional_count("num_experts"))
    router = Router(experts, fields.count("num_experts_per_tok"), normalize=True)
    ffns = hf_ffns(raw, router, width="intermediate_size")
    return hf_config(raw, names=_HF_NAMES, ffns=ffns, windows=fields.optional_count("sliding_window"))


FAMILY = Family("mixtral", "", read_config, _HF_NAMES)
