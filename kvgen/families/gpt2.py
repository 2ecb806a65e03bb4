"""GPT-2: learned positions, layer norms, a plain MLP, and weights that are stored transposed."""

from __future__ import annotations

from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import ATTENTION, BLOCK_NORMS, PLAIN_MLP, fields_of, gguf_config, hf_config, read_activation
from kvgen.families.family import Family, Transform, transposed
from kvgen.model.config import DecoderConfig

_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "h.{i}.attn": None,  # old checkpoints store the causal mask as `attn.bias`
    "h.{i}.ln_1": "blk.{i}.attn_norm",
    "h.{i}.attn.c_attn": "blk.{i}.attn.qkv",
    "h.{i}.attn.c_proj": "blk.{i}.attn.output",
    "h.{i}.ln_2": "blk.{i}.ffn_norm",
    "h.{i}.mlp.c_fc": "blk.{i}.ffn.up",
    "h.{i}.mlp.c_proj": "blk.{i}.ffn.down",
}
# The first release was saved without a head, and so without the prefix.
_HF_NAMES = {**_NAMES, **{f"transformer.{name}": target for name, target in _NAMES.items()}, "lm_head": "output"}
_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    mechanisms: dict[str, Any] = {
        "rotaries": None,
        "norm": "layer",
        "gated": False,
        "biases": ATTENTION | PLAIN_MLP | BLOCK_NORMS,
    }
    fields = fields_of(raw)
    if raw.format == "gguf":
        positions = fields.count("context_length")
        return gguf_config(raw, **mechanisms, activation="gelu_tanh", learned_positions=positions)
    fields.require("scale_attn_weights", True)
    fields.require("scale_attn_by_inverse_layer_idx", False)
    fields.require("add_cross_attention", False)
    sizes = {usual: fields.get(name) for usual, name in _SIZES.items()} | {"num_key_value_heads": None}
    sizes["intermediate_size"] = sizes["intermediate_size"] or 4 * fields.count("n_embd")
    return hf_config(
        raw.with_metadata(sizes),
        **mechanisms,
        names=_HF_NAMES,
        eps="layer_norm_epsilon",
        activation=read_activation(fields, "activation_function"),
        tied_head=True,
        learned_positions=fields.count("n_positions"),
    )


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    return dict.fromkeys(("attn.qkv", "attn.output", "ffn.up", "ffn.down"), transposed)


FAMILY = Family("gpt2", "gpt2", read_config, _HF_NAMES, hf_transforms=hf_transforms)
