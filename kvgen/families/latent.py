"""Read what families with latent attention have in common: DeepSeek-V2 and its descendants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.base import GATED_MLP, HF_NAMES, fields_of, gguf_config, hf_config, read_size
from kvgen.families.experts import HF_EXPERT_NAMES, SHARED_EXPERT
from kvgen.families.family import GGUF_NAMES, NameTable, Transforms, split_halves
from kvgen.families.fields import Fields
from kvgen.families.rope import rotary_from_gguf, rotary_from_hf, yarn_scale
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE
from kvgen.model.mixers import LatentAttention, Rotary

HF_LATENT_NAMES: NameTable = {
    **HF_NAMES,
    **HF_EXPERT_NAMES,
    "model.layers.{i}.self_attn.q_a_proj": "blk.{i}.attn.q_a",
    "model.layers.{i}.self_attn.q_a_layernorm": "blk.{i}.attn.q_a_norm",
    "model.layers.{i}.self_attn.q_b_proj": "blk.{i}.attn.q_b",
    "model.layers.{i}.self_attn.kv_a_proj_with_mqa": "blk.{i}.attn.kv_a",
    "model.layers.{i}.self_attn.kv_a_layernorm": "blk.{i}.attn.kv_a_norm",
    "model.layers.{i}.self_attn.kv_b_proj": "blk.{i}.attn.kv_b",
}
GGUF_LATENT_NAMES: NameTable = {
    **GGUF_NAMES,
    "blk.{i}.attn_q_a": "blk.{i}.attn.q_a",
    "blk.{i}.attn_q_a_norm": "blk.{i}.attn.q_a_norm",
    "blk.{i}.attn_q_b": "blk.{i}.attn.q_b",
    "blk.{i}.attn_kv_a_mqa": "blk.{i}.attn.kv_a",
    "blk.{i}.attn_kv_a_norm": "blk.{i}.attn.kv_a_norm",
    "blk.{i}.attn_kv_b": "blk.{i}.attn.kv_b",  # in files from before May 2025, instead of the next two
    "blk.{i}.attn_k_b": "blk.{i}.attn.k_b",
    "blk.{i}.attn_v_b": "blk.{i}.attn.v_b",
}

_ATTENTION_BIASES = frozenset({"attn.q_a", "attn.kv_a", "attn.output"})
_HF_NORM_EPS = 1e-6  # of the norms of latents in transformers, whatever rms_norm_eps is


def hf_latent_config(raw: RawCheckpoint, ffns: Sequence[MLP | MoE]) -> DecoderConfig:
    """Read the decoder config from config.json. ffns: the feed-forward layer of each layer."""
    fields = fields_of(raw)
    heads, rotated = read_size(raw, "heads"), fields.count("qk_rope_head_dim")
    fields.require("num_key_value_heads", heads)
    fields.require("rope_interleave", True)
    rotary, key_dim = rotary_from_hf(fields, rotated), fields.count("qk_nope_head_dim")
    if 2 * len(rotary.inverse_frequencies) != rotated:
        raise UnsupportedError(f"{fields.path}: partial_rotary_factor must be 1 for latent attention")
    mixer = LatentAttention(
        heads,
        key_dim,
        value_dim=fields.count("v_head_dim"),
        latent_dim=fields.count("kv_lora_rank"),
        query_latent_dim=fields.optional_count("q_lora_rank"),
        rotary=rotary,
        norm_eps=_HF_NORM_EPS,
    )
    biases = _ATTENTION_BIASES if fields.flag("attention_bias", False) else frozenset()
    biases |= GATED_MLP | SHARED_EXPERT if fields.flag("mlp_bias", False) else frozenset()
    return _with_mixer(
        hf_config(raw, names=HF_LATENT_NAMES, rotaries=rotary, ffns=ffns, biases=biases), mixer, _hf_yarn_scale(fields)
    )


def _hf_yarn_scale(fields: Fields) -> float:
    """Return what YaRN multiplies queries and keys by, the dimensions that are not rotated too."""
    rope = fields.section("rope_parameters") or fields.section("rope_scaling")
    if rope is None or (rope.get("rope_type") or rope.get("type") or "default") == "default":
        return 1.0
    if not rope.get("mscale_all_dim"):
        return 1.0
    return yarn_scale(rope.number("factor"), rope.number("mscale_all_dim"))


def gguf_latent_config(raw: RawCheckpoint, ffns: Sequence[MLP | MoE]) -> DecoderConfig:
    """Read the decoder config from GGUF keys.

    `key_length` and `value_length` are of what a position stores if there are `key_length_mla` and `value_length_mla`,
    which are of heads. Files from before May 2025 have only the former, which are of heads.
    """
    keys = fields_of(raw)
    keys.require("attention.temperature_scale", None)  # Mistral Large 3
    heads, rotated = read_size(raw, "heads"), keys.count("rope.dimension_count")
    key_length, value_length = (
        keys.count(f"attention.{name}_mla", keys.optional_count(f"attention.{name}"))
        for name in ("key_length", "value_length")
    )
    if key_length <= rotated:
        raise CheckpointError(f"{raw.path}: keys of {key_length} dimensions, of which {rotated} are rotated")
    rotary, yarn = _gguf_rotary(raw, keys, rotated)
    mixer = LatentAttention(
        heads,
        key_length - rotated,
        value_length,
        latent_dim=keys.count("attention.kv_lora_rank"),
        query_latent_dim=keys.optional_count("attention.q_lora_rank"),
        rotary=rotary,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
    )
    plain = {"key_length": key_length, "value_length": key_length, "head_count_kv": heads}
    sizes = {f"{keys.prefix}attention.{name}": size for name, size in plain.items()}
    raw = raw.with_metadata(sizes)
    return _with_mixer(gguf_config(raw, names=GGUF_LATENT_NAMES, rotaries=rotary, ffns=ffns), mixer, yarn)


def _gguf_rotary(raw: RawCheckpoint, keys: Fields, rotated: int) -> tuple[Rotary, float]:
    """Return the rotary, and what YaRN multiplies queries and keys by.

    llama.cpp stores a tenth of mscale_all_dim, and takes mscale to be the same.
    """
    rotary = rotary_from_gguf(raw, keys, rotated)
    tenth = keys.optional_number("rope.scaling.yarn_log_multiplier")
    if tenth is None:
        return rotary, 1.0
    return replace(rotary, scale=1.0), yarn_scale(keys.number("rope.scaling.factor", 1.0), 10 * tenth)


def _with_mixer(config: DecoderConfig, mixer: LatentAttention, yarn: float) -> DecoderConfig:
    """Return the config with one mixer in all layers. yarn: what its queries and keys are multiplied by."""
    if yarn != 1:
        mixer = replace(mixer, scale=mixer.head_dim**-0.5 * yarn**2)
    return replace(config, layers=tuple(replace(layer, mixer=mixer) for layer in config.layers))


def hf_transforms(config: DecoderConfig) -> Transforms:
    """Undo the interleaved rotation, whose dimensions are the last ones of a head's query and of the latent."""
    mixer = config.layers[0].mixer
    assert isinstance(mixer, LatentAttention)
    queries = partial(_split_last_halves, heads=mixer.heads, rotated=mixer.rotated)
    return {
        "attn.q": queries,
        "attn.q_b": queries,
        "attn.kv_a": partial(_split_last_halves, heads=1, rotated=mixer.rotated),
    }


def gguf_transforms(config: DecoderConfig) -> Transforms:
    """As `hf_transforms`; besides, keys and values have a matrix for each head: (H, C, D_k) and (H, D_v, C)."""
    return {
        **hf_transforms(config),
        "attn.k_b": lambda stored: stored.transpose(1, 2).flatten(0, 1),
        "attn.v_b": lambda stored: stored.flatten(0, 1),
    }


def _split_last_halves(rows: Tensor, heads: int, rotated: int) -> Tensor:
    """Apply `split_halves` to the last dimensions of each head."""
    whole = rows.view(heads, -1, *rows.shape[1:])  # (H, D, ...)
    kept, turned = whole[:, :-rotated], whole[:, -rotated:]
    turned = split_halves(turned.flatten(0, 1), heads).view(turned.shape)
    return torch.cat((kept, turned), dim=1).view(rows.shape)
