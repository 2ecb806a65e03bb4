"""Gemma 4, text: layers of two sizes, inputs and a scale for each, keys shared between layers, experts beside MLPs.

Norms multiply by w, not by 1 + w as in earlier Gemmas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.base import (
    fields_of,
    flagged_biases,
    gguf_config,
    hf_config,
    layer_count,
    read_activation,
    sliding_windows,
)
from kvgen.families.experts import check_router
from kvgen.families.family import Family, NameTable
from kvgen.families.fields import Fields
from kvgen.families.gemma import embedding_scale
from kvgen.families.gemma2 import NORMS
from kvgen.families.rope import plain_rotary, rotary_from_gguf, rotary_from_hf
from kvgen.families.shared_keys import (
    GGUF_NAMES_WITH_INPUTS,
    HF_NAMES_WITH_INPUTS,
    each_layer,
    gguf_layer_inputs,
    has_no_keys,
    with_shared_keys,
)
from kvgen.model.config import DecoderConfig, LayerInputs
from kvgen.model.ffns import MLP, MLPAndExperts, Router
from kvgen.model.mixers import Attention, Rotary

_PATTERN = 6  # every sixth layer has no window
_LOCAL_BASE = 10_000.0
_ROTARIES = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_BASE},
}
_DEFAULTS: dict[str, Any] = {  # of transformers' Gemma4TextConfig
    "vocab_size": 262_144,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "rope_parameters": _ROTARIES,
}
_HF_NAMES: NameTable = {**HF_NAMES_WITH_INPUTS, "model.layers.{i}.layer_scalar": "blk.{i}.scale"}
_GGUF_NAMES: NameTable = {**GGUF_NAMES_WITH_INPUTS, "blk.{i}.layer_output_scale.weight": "blk.{i}.scale"}
_HF_EXPERT_NAMES: NameTable = {
    **_HF_NAMES,
    "model.layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn.mlp_norm",
    "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn.mlp.gate",
    "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn.mlp.up",
    "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn.mlp.down",
    "model.layers.{i}.post_feedforward_layernorm_1": "blk.{i}.ffn.post_mlp_norm",
    "model.layers.{i}.pre_feedforward_layernorm_2": "blk.{i}.ffn.experts_norm",
    "model.layers.{i}.post_feedforward_layernorm_2": "blk.{i}.ffn.post_experts_norm",
    "model.layers.{i}.router.proj": "blk.{i}.ffn.router",
    "model.layers.{i}.router.scale": "blk.{i}.ffn.router.scale",
    "model.layers.{i}.router.per_expert_scale": "blk.{i}.ffn.router.expert_scale",
    "model.layers.{i}.experts.gate_up_proj": "blk.{i}.ffn.experts.gate_up.weight",
    "model.layers.{i}.experts.down_proj": "blk.{i}.ffn.experts.down.weight",
}
_GGUF_EXPERT_NAMES: NameTable = {
    **_GGUF_NAMES,
    "blk.{i}.ffn_norm": "blk.{i}.ffn.mlp_norm",
    "blk.{i}.ffn_gate": "blk.{i}.ffn.mlp.gate",
    "blk.{i}.ffn_up": "blk.{i}.ffn.mlp.up",
    "blk.{i}.ffn_down": "blk.{i}.ffn.mlp.down",
    "blk.{i}.post_ffw_norm_1": "blk.{i}.ffn.post_mlp_norm",
    "blk.{i}.pre_ffw_norm_2": "blk.{i}.ffn.experts_norm",
    "blk.{i}.post_ffw_norm_2": "blk.{i}.ffn.post_experts_norm",
    "blk.{i}.ffn_gate_inp.scale": "blk.{i}.ffn.router.scale",
    "blk.{i}.ffn_down_exps.scale": "blk.{i}.ffn.router.expert_scale",
}


@dataclass(frozen=True)
class _Sizes:
    """What may differ from layer to layer, one number for each layer."""

    head_dims: Sequence[int]
    kv_heads: Sequence[int]
    widths: Sequence[int]


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _read_gguf(raw) if raw.format == "gguf" else _read_hf(raw)


def _read_hf(raw: RawCheckpoint) -> DecoderConfig:
    raw = raw.with_defaults(_DEFAULTS)
    fields, count = fields_of(raw), layer_count(raw)
    fields.require("use_bidirectional_attention", "vision")  # between the tokens of an image, of which there are none
    windows = sliding_windows(raw, lambda layer: (layer + 1) % _PATTERN != 0)
    windows[-1:] = [None]  # as in transformers
    shared, width = fields.whole("num_kv_shared_layers", 0), fields.count("intermediate_size")
    wide = 2 * width if fields.flag("use_double_wide_mlp", False) else width
    widths = [width if layer < count - shared else wide for layer in range(count)]
    sizes = _Sizes(*_hf_heads(fields, windows), widths)
    keys_as_values = fields.flag("attention_k_eq_v", False)
    router = _hf_router(fields)
    config = hf_config(
        raw,
        names=_HF_NAMES if router is None else _HF_EXPERT_NAMES,
        tied_head=True,
        biases=flagged_biases(raw),
        windows=windows,
        rotaries=[_hf_rotary(fields, *each) for each in zip(windows, sizes.head_dims, strict=True)],
        ffns=_ffns(sizes, router, fields, "moe_intermediate_size", "hidden_activation"),
        layer_inputs=_hf_layer_inputs(fields),
        block_scales=True,
        **_mechanisms(raw, router),
    )
    as_values = [keys_as_values and window is None for window in windows]
    return with_shared_keys(_with_sizes(config, sizes, as_values, fields), shared, fields.path)


def _read_gguf(raw: RawCheckpoint) -> DecoderConfig:
    keys, count = fields_of(raw), layer_count(raw)
    windows = sliding_windows(raw, lambda layer: (layer + 1) % _PATTERN != 0)
    full, local = keys.count("attention.key_length"), keys.count("attention.key_length_swa")
    keys.require("attention.value_length_swa", local)
    keys.require("rope.dimension_count", full)
    keys.require("rope.dimension_count_swa", local)
    sizes = _Sizes(
        [full if window is None else local for window in windows],
        each_layer(keys, "attention.head_count_kv", count),
        each_layer(keys, "feed_forward_length", count),
    )
    router = None
    if keys.whole("expert_count", 0):
        router = Router(keys.count("expert_count"), keys.count("expert_used_count"), normalize=True)
    global_rotary = rotary_from_gguf(raw, keys, full)
    # llama.cpp stores 1e30 as the factor of dimensions that are not rotated.
    turned = tuple(f if f > 1e-20 else 0.0 for f in global_rotary.inverse_frequencies)
    local_rotary = plain_rotary(keys, local, keys.number("rope.freq_base_swa", _LOCAL_BASE))
    rotaries = [replace(global_rotary, inverse_frequencies=turned) if w is None else local_rotary for w in windows]
    config = gguf_config(
        raw.with_metadata({f"{keys.prefix}attention.head_count_kv": sizes.kv_heads[0]}),
        names=_GGUF_NAMES if router is None else _GGUF_EXPERT_NAMES,
        windows=windows,
        rotaries=rotaries,
        ffns=_ffns(sizes, router, keys, "expert_feed_forward_length", None),
        layer_inputs=gguf_layer_inputs(raw),
        block_scales="blk.0.layer_output_scale.weight" in raw.tensors,
        **_mechanisms(raw, router),
    )
    as_values = [f"blk.{layer}.attn_v.weight" not in raw.tensors for layer in range(count)]
    shared = keys.whole("attention.shared_kv_layers", 0)
    return with_shared_keys(_with_sizes(config, sizes, as_values, keys), shared, keys.path)


def _mechanisms(raw: RawCheckpoint, router: Router | None) -> dict[str, Any]:
    return {
        "norms": NORMS if router is None else NORMS - {"ffn_norm"},
        "attention": {"qk_norm": "head", "scale": 1.0, "value_norm": True},
        "embedding_scale": embedding_scale(raw),
        "logit_softcap": fields_of(raw).optional_number("final_logit_softcapping"),
    }


def _with_sizes(config: DecoderConfig, sizes: _Sizes, as_values: Sequence[bool], fields: Fields) -> DecoderConfig:
    """as_values: whether the values of each layer are its keys."""
    layers = []
    for layer, size, heads, keys in zip(config.layers, sizes.head_dims, sizes.kv_heads, as_values, strict=True):
        assert isinstance(layer.mixer, Attention)
        if layer.mixer.heads % heads:
            raise CheckpointError(f"{fields.path}: {layer.mixer.heads} heads cannot share {heads} key-value heads")
        mixer = replace(layer.mixer, kv_heads=heads, head_dim=size, keys_as_values=keys)
        layers.append(replace(layer, mixer=mixer))
    return replace(config, layers=tuple(layers))


def _ffns(
    sizes: _Sizes, router: Router | None, fields: Fields, width: str, activation_field: str | None
) -> list[MLP | MLPAndExperts]:
    """width: the field that has the width of an expert. activation_field: None in GGUF files, which do not name it."""
    activation = "gelu_tanh" if activation_field is None else read_activation(fields, activation_field)
    mlps = [MLP(width, activation=activation) for width in sizes.widths]
    if router is None:
        return [*mlps]
    check_router(router, fields.path)
    expert = MLP(fields.count(width), activation=activation)
    return [MLPAndExperts(mlp, router, expert) for mlp in mlps]


def _hf_router(fields: Fields) -> Router | None:
    if not fields.flag("enable_moe_block", False):
        return None
    return Router(fields.count("num_experts"), fields.count("top_k_experts"), normalize=True)


def _hf_layer_inputs(fields: Fields) -> LayerInputs | None:
    width = fields.whole("hidden_size_per_layer_input")
    if not width:
        return None
    rows = fields.count("vocab_size_per_layer_input")
    if rows < fields.count("vocab_size"):
        raise UnsupportedError(f"{fields.path}: vocab_size_per_layer_input is {rows}, less than vocab_size")
    return LayerInputs(width, rows, read_activation(fields, "hidden_activation"))


def _hf_heads(fields: Fields, windows: Sequence[int | None]) -> tuple[list[int], list[int]]:
    """Return the size of a head and the number of key-value heads of each layer.

    transformers 5.2 and newer list the layers that differ in `per_layer_config`.
    """
    size, heads = fields.count("head_dim"), fields.count("num_key_value_heads")
    if fields.get("per_layer_config") is None:
        own = fields.flag("attention_k_eq_v", False)
        full_size = fields.count("global_head_dim")
        full_heads = fields.count("num_global_key_value_heads", heads) if own else heads
        return [full_size if w is None else size for w in windows], [
            full_heads if w is None else heads for w in windows
        ]
    sizes, counts = [size] * len(windows), [heads] * len(windows)
    overrides = fields.section("per_layer_config")
    for name, values in () if overrides is None else overrides.values.items():
        known = isinstance(values, dict) and values.keys() <= {"head_dim", "num_key_value_heads"}
        if not known or not name.isdecimal() or int(name) >= len(windows):
            raise UnsupportedError(f"{fields.path}: per_layer_config has {name!r:.80}: {values!r:.80}")
        layer = Fields(values, fields.path)
        sizes[int(name)] = layer.count("head_dim", size)
        counts[int(name)] = layer.count("num_key_value_heads", heads)
    return sizes, counts


def _hf_rotary(fields: Fields, window: int | None, head_dim: int) -> Rotary:
    kind = "full_attention" if window is None else "sliding_attention"
    nested = fields.section("rope_parameters")
    section = None if nested is None else nested.section(kind)
    if section is None:
        raise CheckpointError(f"{fields.path}: rope_parameters has no {kind}")
    if section.get("rope_type") == "proportional":
        return _proportional(section, head_dim)
    section.require("partial_rotary_factor", 1.0)
    context = fields.get("max_position_embeddings")
    whole = Fields({"max_position_embeddings": context, "rope_parameters": section.values}, fields.path)
    return rotary_from_hf(whole, head_dim)


def _proportional(section: Fields, head_dim: int) -> Rotary:
    """Frequencies as of a whole head, of which only the first are used: the other pairs turn by 0."""
    rotary = plain_rotary(section, head_dim, section.number("rope_theta"))
    share, factor = section.number("partial_rotary_factor", 1.0), section.number("factor", 1.0)
    frequencies, pairs = rotary.inverse_frequencies, int(share * head_dim // 2)
    if pairs > len(frequencies):
        raise CheckpointError(f"{section.path}: partial_rotary_factor is {share}; it must be at most 1")
    turned = (frequency / factor if pair < pairs else 0.0 for pair, frequency in enumerate(frequencies))
    return Rotary(tuple(turned))


_EXPERTS_FAMILY = Family(
    "gemma4_text", "gemma4", read_config, _HF_EXPERT_NAMES, gguf_names=_GGUF_EXPERT_NAMES, ignores=has_no_keys
)


def _with_experts(raw: RawCheckpoint) -> Family | None:
    """Where there are experts, an MLP and its norm have other names in the decoder."""
    flag = raw.metadata.get("gemma4.expert_count" if raw.format == "gguf" else "enable_moe_block")
    return _EXPERTS_FAMILY if flag else None


FAMILY = Family(
    "gemma4_text",
    "gemma4",
    read_config,
    _HF_NAMES,
    gguf_names=_GGUF_NAMES,
    ignores=has_no_keys,
    variant=_with_experts,
)
