"""Qwen3 with mixtures of experts: Qwen3-30B-A3B and -235B-A22B."""

from __future__ import annotations

from collections.abc import Callable

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError
from kvgen.families.base import HF_NAMES, HF_QK_NORM_NAMES, fields_of, flagged_biases, gguf_config, hf_config
from kvgen.families.experts import HF_EXPERT_NAMES, gguf_ffns, hf_ffns
from kvgen.families.family import Family
from kvgen.families.fields import Fields
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import Router

_HF_NAMES = {**HF_NAMES, **HF_EXPERT_NAMES, **HF_QK_NORM_NAMES}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        return gguf_config(raw, attention={"qk_norm": "head"}, ffns=gguf_ffns(raw, normalize=True))
    window = fields.count("sliding_window") if fields.flag("use_sliding_window", False) else None
    ffns = hf_ffns(raw, read_router(fields), sparse=is_sparse(fields))
    biases = flagged_biases(raw)
    return hf_config(raw, names=_HF_NAMES, attention={"qk_norm": "head"}, windows=window, ffns=ffns, biases=biases)


def read_router(fields: Fields) -> Router:
    experts = fields.count("num_experts", fields.optional_count("num_local_experts"))
    return Router(experts, fields.count("num_experts_per_tok"), normalize=fields.flag("norm_topk_prob", False))


def is_sparse(fields: Fields) -> Callable[[int], bool]:
    """Return whether a layer is a mixture: every `decoder_sparse_step`th one, unless `mlp_only_layers` lists it."""
    step, dense = fields.count("decoder_sparse_step", 1), fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise CheckpointError(f"{fields.path}: mlp_only_layers is {dense!r:.80}; it must be a list of layers")
    return lambda layer: layer not in dense and (layer + 1) % step == 0


FAMILY = Family("qwen3_moe", "qwen3moe", read_config, _HF_NAMES)
