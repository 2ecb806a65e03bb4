"""Qwen1.5 and 2 with mixtures of experts: a shared expert behind a gate."""

from __future__ import annotations

from collections.abc import Sequence

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import HF_NAMES, QKV, fields_of, gguf_config, hf_config, read_size, sliding_windows
from kvgen.families.experts import HF_EXPERT_NAMES, as_row, gguf_ffns, hf_ffns
from kvgen.families.family import Family, Transforms
from kvgen.families.qwen3_moe import is_sparse, read_router
from kvgen.model.config import DecoderConfig

_HF_NAMES = {**HF_NAMES, **HF_EXPERT_NAMES}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    if raw.format == "gguf":
        shared = fields.count("expert_shared_feed_forward_length", read_size(raw, "ffn_width"))
        ffns = gguf_ffns(raw, normalize=False, shared=shared, shared_gate=True)
        return gguf_config(raw, ffns=ffns, biases=QKV)
    ffns = hf_ffns(
        raw,
        read_router(fields),
        shared=fields.count("shared_expert_intermediate_size"),
        shared_gate=True,
        sparse=is_sparse(fields),
    )
    biases = QKV if fields.flag("qkv_bias", True) else frozenset()
    return hf_config(raw, names=_HF_NAMES, ffns=ffns, windows=_read_windows(raw), biases=biases)


def _read_windows(raw: RawCheckpoint) -> Sequence[int | None] | None:
    """With `use_sliding_window`, every other layer below `max_window_layers` has a window."""
    fields = fields_of(raw)
    if not fields.flag("use_sliding_window", False):
        return None
    last = fields.whole("max_window_layers", 28)
    return sliding_windows(raw, lambda layer: layer < last and layer % 2 == 0)


def gguf_transforms(config: DecoderConfig) -> Transforms:
    return {"ffn.shared_gate": as_row}


FAMILY = Family("qwen2_moe", "qwen2moe", read_config, _HF_NAMES, gguf_transforms=gguf_transforms)
