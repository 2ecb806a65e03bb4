"""Mixtral: Mistral with mixtures of experts. GGUF files call it `llama`."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, fields_of, hf_config
from kvgen.families.experts import hf_ffns
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import Router

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.block_sparse_moe.gate": "blk.{i}.ffn.router",
    "model.layers.{i}.block_sparse_moe.experts.{j}.w1": "blk.{i}.ffn.experts.gate",
    "model.layers.{i}.block_sparse_moe.experts.{j}.w3": "blk.{i}.ffn.experts.up",
    "model.layers.{i}.block_sparse_moe.experts.{j}.w2": "blk.{i}.ffn.experts.down",
    "model.layers.{i}.mlp.gate": "blk.{i}.ffn.router",
    "model.layers.{i}.mlp.experts.gate_up_proj": "blk.{i}.ffn.experts.gate_up.weight",
    "model.layers.{i}.mlp.experts.down_proj": "blk.{i}.ffn.experts.down.weight",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    experts = fields.count("num_local_experts", fields.optional_count("num_experts"))
    router = Router(experts, fields.count("num_experts_per_tok"), normalize=True)
    ffns = hf_ffns(raw, router, width="intermediate_size")
    return hf_config(raw, names=_HF_NAMES, ffns=ffns, windows=fields.optional_count("sliding_window"))


FAMILY = Family("mixtral", "", read_config, _HF_NAMES)
