"""Nemotron-H and Nemotron 3: each layer is one of Mamba 2, attention without rotation, an MLP or experts."""

from __future__ import annotations

import math
from dataclasses import replace

from kvgen.checkpoint import RawCheckpoint
from kvgen.families.base import PLAIN_MLP, fields_of, gguf_config, hf_config, layer_count, read_activation
from kvgen.families.experts import gguf_ffns, hf_ffns
from kvgen.families.family import GGUF_NAMES, Family, predicts_ahead
from kvgen.families.fields import Fields
from kvgen.families.glm4_moe import read_router
from kvgen.families.hybrids import (
    ATTENDS,
    check_mamba2,
    gguf_mamba2_names,
    gguf_mamba2_transforms,
    hf_mamba2_transforms,
    read_gguf_mamba2,
    read_layer_kinds,
    read_sizes,
)
from kvgen.families.mamba2 import HF_NAMES as HF_MAMBA2_NAMES
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.ffns import MLP, MoE
from kvgen.model.mixers import Mamba2

_LETTERS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
_NORMS = frozenset({"attn_norm"})
_MLP_BIASES = PLAIN_MLP | {"ffn.shared.up", "ffn.shared.down", "ffn.latent_down", "ffn.latent_up"}
_HF_NAMES = {
    **HF_MAMBA2_NAMES,
    "backbone.layers.{i}.mixer.q_proj": "blk.{i}.attn.q",
    "backbone.layers.{i}.mixer.k_proj": "blk.{i}.attn.k",
    "backbone.layers.{i}.mixer.v_proj": "blk.{i}.attn.v",
    "backbone.layers.{i}.mixer.o_proj": "blk.{i}.attn.output",
    "backbone.layers.{i}.mixer.up_proj": "blk.{i}.ffn.up",
    "backbone.layers.{i}.mixer.down_proj": "blk.{i}.ffn.down",
    "backbone.layers.{i}.mixer.gate": "blk.{i}.ffn.router",
    "backbone.layers.{i}.mixer.gate.e_score_correction_bias": "blk.{i}.ffn.router.selection.bias",
    "backbone.layers.{i}.mixer.experts.{j}.up_proj": "blk.{i}.ffn.experts.up",
    "backbone.layers.{i}.mixer.experts.{j}.down_proj": "blk.{i}.ffn.experts.down",
    "backbone.layers.{i}.mixer.shared_experts.up_proj": "blk.{i}.ffn.shared.up",
    "backbone.layers.{i}.mixer.shared_experts.down_proj": "blk.{i}.ffn.shared.down",
    "backbone.layers.{i}.mixer.fc1_latent_proj": "blk.{i}.ffn.latent_down",
    "backbone.layers.{i}.mixer.fc2_latent_proj": "blk.{i}.ffn.latent_up",
}
_GGUF_NAMES = {
    **GGUF_NAMES,
    **gguf_mamba2_names(),
    "blk.{i}.ffn_latent_down": "blk.{i}.ffn.latent_down",
    "blk.{i}.ffn_latent_up": "blk.{i}.ffn.latent_up",
}


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    return _read_gguf(raw) if raw.format == "gguf" else _read_hf(raw)


def _read_hf(raw: RawCheckpoint) -> DecoderConfig:
    fields = fields_of(raw)
    fields.require("mamba_hidden_act", "silu")
    kinds = _read_kinds(raw, fields)
    named = {
        "tie_word_embeddings": False,  # transformers never ties them
        "num_hidden_layers": len(kinds),
        "hidden_act": fields.get("mlp_hidden_act") or "relu2",
        "head_dim": fields.count("head_dim", fields.count("attention_head_dim", 128)),
        "norm_topk_prob": fields.flag("norm_topk_prob", True),
    }
    raw = raw.with_metadata(named)
    config = hf_config(
        raw,
        names=_HF_NAMES,
        eps="layer_norm_epsilon",
        norms=_NORMS,
        rotaries=None,
        ffns=_hf_ffns(raw, kinds),
        biases=_MLP_BIASES if fields.flag("mlp_bias", False) else frozenset(),
    )
    if "linear_attention" not in kinds:
        return _one_part_each(config, kinds, None)
    biases = {"attn.in_proj", "attn.out_proj"} if fields.flag("use_bias", False) else set()
    biases |= {"attn.conv"} if fields.flag("mamba_conv_bias", fields.flag("use_conv_bias", True)) else set()
    return _one_part_each(replace(config, biases=config.biases | biases), kinds, _hf_mamba2(raw, fields))


def _read_kinds(raw: RawCheckpoint, fields: Fields) -> list[str]:
    """Read transformers' word for each layer. Before version 5 there was a letter for each."""
    pattern = fields.get("hybrid_override_pattern")
    if fields.get("layers_block_type") is None and isinstance(pattern, str):
        fields = Fields({"layers_block_type": [_LETTERS.get(letter) for letter in pattern]}, fields.path)
    found = fields.get("layers_block_type")
    stated = fields_of(raw).get("num_hidden_layers") is not None or not isinstance(found, list)
    count, name = layer_count(raw) if stated else len(found), "layer_types" if found is None else "layers_block_type"
    kinds = read_layer_kinds(fields, count, [*ATTENDS, "moe", "mlp"], name=name)
    return [{"attention": "full_attention", "mamba": "linear_attention"}.get(kind, kind) for kind in kinds]


def _hf_ffns(raw: RawCheckpoint, kinds: list[str]) -> list[MLP | MoE]:
    fields = fields_of(raw)
    if "moe" not in kinds:
        return [MLP(fields.count("intermediate_size"), False, read_activation(fields, "hidden_act"))] * len(kinds)
    shared, latent = fields.count("moe_shared_expert_intermediate_size"), fields.optional_count("moe_latent_size")
    ffns = hf_ffns(raw, read_router(fields), shared=shared, gated=False, sparse=lambda layer: kinds[layer] == "moe")
    return [replace(ffn, latent=latent) if isinstance(ffn, MoE) else ffn for ffn in ffns]


def _hf_mamba2(raw: RawCheckpoint, fields: Fields) -> Mamba2:
    """transformers takes the least time step from `time_step_min`, and ignores `time_step_limit`."""
    mixer = Mamba2(
        heads=fields.count("mamba_num_heads", 128),
        head_dim=fields.count("mamba_head_dim", 64),
        groups=fields.count("mamba_n_groups", fields.count("n_groups", 8)),
        size=fields.count("ssm_state_size", 128),
        width=fields.count("mamba_d_conv", fields.count("conv_kernel", 4)),
        dt_limit=(fields.number("mamba_dt_min", fields.number("time_step_min", 0.001)), math.inf),
    )
    return check_mamba2(mixer, raw)


def _read_gguf(raw: RawCheckpoint) -> DecoderConfig:
    """A layer has an MLP, or key-value heads, or else it is Mamba 2."""
    raw, attends = read_sizes(raw, "attention.head_count_kv")
    raw, has_mlp = read_sizes(raw, "feed_forward_length")
    config = gguf_config(raw, names=_GGUF_NAMES, norms=_NORMS, rotaries=None, ffns=_gguf_ffns(raw))
    pairs = zip(attends, has_mlp, strict=True)
    kinds = ["mlp" if mlp else "full_attention" if attention else "linear_attention" for attention, mlp in pairs]
    return _one_part_each(config, kinds, read_gguf_mamba2(raw))


def _gguf_ffns(raw: RawCheckpoint) -> list[MLP | MoE]:
    """No width if no layer has an MLP."""
    keys = fields_of(raw)
    if not keys.get("expert_count"):
        return [MLP(keys.count("feed_forward_length", 1), False, "relu2")] * layer_count(raw)
    ffns = gguf_ffns(
        raw,
        scores="sigmoid",
        normalize=False,
        shared=keys.whole("expert_shared_feed_forward_length", 0),
        selection_bias=True,
        gated=False,
        activation="relu2",
    )
    latent = keys.optional_count("moe_latent_size")
    return [replace(ffn, latent=latent) if isinstance(ffn, MoE) else ffn for ffn in ffns]


def _one_part_each(config: DecoderConfig, kinds: list[str], mamba2: Mamba2 | None) -> DecoderConfig:
    """Keep of each layer the part that it has, or replace its attention."""
    layers = []
    for layer, kind in zip(config.layers, kinds, strict=True):
        mixer = {"full_attention": layer.mixer, "linear_attention": mamba2}.get(kind)
        layers.append(Layer(mixer, layer.ffn if mixer is None else None))
    return replace(config, layers=tuple(layers))


FAMILY = Family(
    "nemotron_h",
    "nemotron_h",
    read_config,
    _HF_NAMES,
    gguf_names=_GGUF_NAMES,
    hf_transforms=hf_mamba2_transforms,
    gguf_transforms=gguf_mamba2_transforms,
    ignores=predicts_ahead,
)
