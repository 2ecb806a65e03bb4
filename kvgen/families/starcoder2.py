"""StarCoder2: layer norms, a plain MLP, biases everywhere, and a window in every layer."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, BLOCK_NORMS, HF_NAMES, PLAIN_MLP, fields_of, gguf_config, hf_config
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.mlp.c_fc": "blk.{i}.ffn.up",
    "model.layers.{i}.mlp.c_proj": "blk.{i}.ffn.down",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    mechanisms: dict[str, Any] = {"norm": "layer", "gated": False}
    if raw.format == "gguf":  # stores no window
        return gguf_config(raw, **mechanisms, activation="gelu_tanh", biases=BLOCK_NORMS)
    fields = fields_of(raw)
    linear = ATTENTION | PLAIN_MLP if fields.flag("use_bias", True) else frozenset()
    return hf_config(
        raw,
        **mechanisms,
        names=_HF_NAMES,
        eps="norm_epsilon",
        tied_head=True,
        windows=fields.optional_count("sliding_window"),
        biases=BLOCK_NORMS | linear,
    )


FAMILY = Family("starcoder2", "starcoder2", read_config, _HF_NAMES)
