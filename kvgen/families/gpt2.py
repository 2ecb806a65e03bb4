"""GPT-2: learned positions, layer norms, a plain MLP, and weights that are stored transposed."""

from __future__ import annotations

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import (
    ATTENTION,
    BLOCK_NORMS,
    PLAIN_MLP,
    gguf_config,
    gguf_fields,
    gguf_layers,
    hf_config,
    hf_fields,
    hf_layers,
)
from kvgen.families.family import Family, Transform, transposed
from kvgen.model.config import DecoderConfig

_BIASES = ATTENTION | PLAIN_MLP | BLOCK_NORMS
_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
}
_BARE = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "h.{i}.attn": None,  # the causal mask, which old files hold as `attn.bias`
    **{f"h.{{i}}.{theirs}": f"blk.{{i}}.{ours}" for theirs, ours in _BLOCK.items()},
}
# The first release was saved without its head, and so without the prefix.
_HF_NAMES = {**_BARE, **{f"transformer.{name}": target for name, target in _BARE.items()}, "lm_head": "output"}
_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _from_gguf(raw) if raw.format == "gguf" else _from_hf(raw)


def _from_hf(raw: RawCheckpoint) -> DecoderConfig:
    fields = hf_fields(raw)
    fields.require("scale_attn_weights", True)
    fields.require("scale_attn_by_inverse_layer_idx", False)
    fields.require("add_cross_attention", False)
    sizes = {ours: fields.get(theirs) for ours, theirs in _SIZES.items()}
    sizes["intermediate_size"] = sizes["intermediate_size"] or 4 * fields.count("n_embd")
    return hf_config(
        RawCheckpoint(raw.path, raw.format, {**raw.metadata, **sizes}, raw.tensors),
        names=_HF_NAMES,
        eps="layer_norm_epsilon",
        kv_heads=fields.count("n_head"),
        activation_field="activation_function",
        tied_head=True,
        rotaries=[None] * hf_layers(raw, "n_layer"),
        norm="layer",
        gated=False,
        learned_positions=fields.count("n_positions"),
        biases=_BIASES,
    )


def _from_gguf(raw: RawCheckpoint) -> DecoderConfig:
    keys = gguf_fields(raw)
    return gguf_config(
        raw,
        eps="attention.layer_norm_epsilon",
        rotaries=[None] * gguf_layers(raw),
        norm="layer",
        gated=False,
        activation="gelu_tanh",
        learned_positions=keys.count("context_length"),
        biases=_BIASES,
    )


def hf_transforms(config: DecoderConfig) -> dict[str, Transform]:
    return dict.fromkeys(("attn.qkv", "attn.output", "ffn.up", "ffn.down"), transposed)


FAMILY = Family("gpt2", "gpt2", read_config, _HF_NAMES, hf_transforms=hf_transforms)
