"""StarCoder2: layer norms, a plain MLP, biases everywhere, and a window in every layer."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import (
    ATTENTION,
    BLOCK_NORMS,
    HF_NAMES,
    PLAIN_MLP,
    gguf_config,
    hf_config,
    hf_fields,
    hf_layers,
)
from kvgen.families.family import Family
from kvgen.model.config import DecoderConfig

_HF_NAMES = {
    **HF_NAMES,
    "model.layers.{i}.mlp.c_fc": "blk.{i}.ffn.up",
    "model.layers.{i}.mlp.c_proj": "blk.{i}.ffn.down",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    if raw.format == "gguf":  # where the window is not written
        return gguf_config(
            raw,
            eps="attention.layer_norm_epsilon",
            norm="layer",
            gated=False,
            activation="gelu_tanh",
            biases=BLOCK_NORMS,
        )
    fields = hf_fields(raw)
    linear = ATTENTION | PLAIN_MLP if fields.flag("use_bias", True) else frozenset()
    return hf_config(
        raw,
        names=_HF_NAMES,
        eps="norm_epsilon",
        tied_head=True,
        norm="layer",
        gated=False,
        windows=[fields.optional_count("sliding_window")] * hf_layers(raw),
        biases=BLOCK_NORMS | linear,
    )


FAMILY = Family("starcoder2", "starcoder2", read_config, _HF_NAMES)
