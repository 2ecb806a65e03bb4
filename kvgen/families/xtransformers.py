"""x-transformers checkpoints on kvgen's decoder, where every option of their config is a mechanism that it has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families.base import layer_count
from kvgen.families.family import Family, Transform, plus_one, split_halves
from kvgen.families.fields import Fields
from kvgen.model.config import MLP, Attention, DecoderConfig, Layer, QKNorm, Rotary

# Options that do not change what an evaluated model computes.
_INDIFFERENT = {
    "wrapper": {"emb_dropout", "emb_frac_gradient", "attn_z_loss_weight"},
    "decoder": {"attn_flash", "attn_dropout", "attn_sublayer_dropout", "ff_dropout", "ff_sublayer_dropout"}
    | {"layer_dropout", "zero_init_branch_output", "verbose"},
}
_KNOWN = {
    "wrapper": {"num_tokens", "max_seq_len", "use_abs_pos_emb", "tie_embedding", "tie_embedding_scale"},
    "decoder": {"dim", "depth", "heads", "attn_dim_head", "attn_kv_heads", "attn_one_kv_head"}
    | {"rotary_pos_emb", "rotary_emb_dim", "rotary_interpolation_factor", "rotary_base_rescale_factor"}
    | {"alibi_pos_bias", "alibi_num_heads", "disable_abs_pos_emb", "use_rmsnorm"}
    | {"attn_qk_norm", "attn_qk_norm_scale", "attn_qk_norm_dim_scale"}
    | {"attn_softclamp_logits", "attn_logit_softclamp_value"}
    | {"ff_mult", "ff_glu", "ff_swish", "ff_no_bias"},
}
_DEFAULTS = {
    "norm_add_unit_offset": True,
    "pre_norm": True,
    "pre_norm_has_final_norm": True,
    "attn_qk_norm_groups": 1,
    "causal": True,
}
"""The one value that an option may have, where that is not False."""
_DIM_HEAD = 64  # the library's default
_BLOCK = {
    "attn": {
        "0.0.g": "attn_norm.weight",
        "0.0.gamma": "attn_norm.weight",
        "1.to_q.weight": "attn.q.weight",
        "1.to_k.weight": "attn.k.weight",
        "1.to_v.weight": "attn.v.weight",
        "1.to_out.weight": "attn.output.weight",
        "1.qk_norm_q_scale": "attn.q_norm.weight",
        "1.qk_norm_k_scale": "attn.k_norm.weight",
    },
    "ffn": {
        "0.0.g": "ffn_norm.weight",
        "0.0.gamma": "ffn_norm.weight",
        "1.ff.0.proj.weight": "ffn.up_gate.weight",
        "1.ff.0.proj.bias": "ffn.up_gate.bias",
        "1.ff.0.0.weight": "ffn.up.weight",
        "1.ff.0.0.bias": "ffn.up.bias",
        "1.ff.2.weight": "ffn.down.weight",
        "1.ff.2.bias": "ffn.down.bias",
    },
}
_OUTSIDE = {
    "token_emb.emb.weight": "token_embd.weight",
    "pos_emb.emb.weight": "position_embd.weight",
    "to_logits.weight": "output.weight",
    "attn_layers.final_norm.g": "output_norm.weight",
    "attn_layers.final_norm.gamma": "output_norm.weight",
    "attn_layers.rotary_pos_emb.inv_freq": "rotary.weight",
}


_MOST_HEADS = 2**16  # each gets a slope or a place in an order before its weights are looked at


def rename(name: str) -> str:
    """The library numbers attention and MLP in turn; here they are the two parts of a block."""
    numbered = re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.+)", name)
    if numbered is None:
        return _OUTSIDE.get(name, name)
    number, rest = int(numbered[1]), numbered[2]
    part = _BLOCK["ffn" if number % 2 else "attn"].get(rest)
    return name if part is None else f"blk.{number // 2}.{part}"


def _table() -> dict[str, str | None]:
    stems = {target.rpartition(".")[0] for part in _BLOCK.values() for target in part.values()}
    outside = {target.rpartition(".")[0] for target in _OUTSIDE.values()} - {"rotary"}
    return {f"blk.{{i}}.{stem}": f"blk.{{i}}.{stem}" for stem in stems} | {s: s for s in outside} | {"rotary": None}


_NAMES = _table()


def obstacle(config: Mapping[str, Any]) -> str | None:
    """The first option, `part.name`, that the decoder has no mechanism for; None if there is none."""
    for part, known in _KNOWN.items():
        for name, value in config[part].items():
            fixed = _DEFAULTS.get(name, False)
            if name not in known and name not in _INDIFFERENT[part] and value not in (fixed, None):
                return f"{part}.{name}"
    decoder = config["decoder"]
    if decoder.get("heads", 8) == 1:
        return "decoder.heads"  # the library leaves the output projection out
    if decoder.get("attn_softclamp_logits") and decoder.get("alibi_pos_bias"):
        return "decoder.attn_softclamp_logits"
    return None


def read_config(raw: RawCheckpoint) -> DecoderConfig:
    """Raises UnsupportedError, naming the option, if there is an obstacle."""
    found = obstacle(raw.metadata)
    path = raw.path / "config.json"
    if found is not None:
        value = raw.metadata[found.partition(".")[0]].get(found.partition(".")[2])
        raise UnsupportedError(f"{path}: {found} is {value!r:.80}, which the native decoder does not have")
    wrapper, decoder = (Fields(raw.metadata[part], path) for part in ("wrapper", "decoder"))
    dim, heads = decoder.count("dim"), decoder.count("heads", 8)
    head_dim = decoder.count("attn_dim_head", _DIM_HEAD)
    kv_heads = 1 if decoder.get("attn_one_kv_head") else decoder.count("attn_kv_heads", heads)
    if heads > _MOST_HEADS:
        raise CheckpointError(f"{path}: heads is {heads}; it must be at most {_MOST_HEADS}")
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} heads cannot share {kv_heads} key-value heads")
    tied, rotates = bool(wrapper.get("tie_embedding")), bool(decoder.get("rotary_pos_emb"))
    gated = bool(decoder.get("ff_glu"))
    up = {"ffn.up", "ffn.gate"} if gated else {"ffn.up"}
    no_bias = bool(decoder.get("ff_no_bias"))
    positions = 0 if _no_positions(wrapper, decoder, rotates) else wrapper.count("max_seq_len")
    normed = bool(decoder.get("attn_qk_norm"))
    capped = bool(decoder.get("attn_softclamp_logits"))
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        rotary=_rotary(raw, decoder) if rotates else None,
        qk_norm=_qk_norm(decoder) if normed else None,
        alibi=_slopes(decoder, heads, kv_heads) if decoder.get("alibi_pos_bias") else (),
        scale=_qk_scale(decoder, head_dim) if normed else None,
        softcap=decoder.number("attn_logit_softclamp_value", 50.0) if capped else None,
    )
    mlp = MLP(int(dim * decoder.number("ff_mult", 4)), gated, "silu" if decoder.get("ff_swish") else "gelu")
    return DecoderConfig(
        vocab_size=wrapper.count("num_tokens"),
        context_length=positions or None,
        dim=dim,
        layers=(Layer(attention, mlp),) * layer_count(raw, decoder, "depth"),
        norm="rms" if decoder.get("use_rmsnorm") else "layer",
        norm_eps=_NO_EPS if decoder.get("use_rmsnorm") else 1e-5,
        tied_head=tied,
        biases=frozenset((up if gated or not no_bias else set()) | (set() if no_bias else {"ffn.down"})),
        learned_positions=positions,
        logit_scale=wrapper.number("tie_embedding_scale", dim**-0.5) if tied else 1.0,
    )


_NO_EPS = 1e-30  # the library's norms of this kind have none; this keeps a vector of zeros from being one of NaN


def _no_positions(wrapper: Fields, decoder: Fields, rotates: bool) -> bool:
    disabled = decoder.get("disable_abs_pos_emb")
    return not wrapper.flag("use_abs_pos_emb", True) or bool(rotates if disabled is None else disabled)


def _rotary(raw: RawCheckpoint, decoder: Fields) -> Rotary:
    """The frequencies are a buffer of the checkpoint, so they are read rather than computed."""
    tensor = raw.tensors.get("attn_layers.rotary_pos_emb.inv_freq")
    if tensor is None:
        raise CheckpointError(f"{raw.path}: the tensor attn_layers.rotary_pos_emb.inv_freq is missing")
    frequencies = tensor.read().float() / decoder.number("rotary_interpolation_factor", 1.0)
    return Rotary(tuple(frequencies.tolist()))


def _qk_norm(decoder: Fields) -> QKNorm:
    return QKNorm("l2", "each-head" if decoder.get("attn_qk_norm_dim_scale") else "unscaled", 0.0)


def _qk_scale(decoder: Fields, head_dim: int) -> float:
    return head_dim**-0.5 if decoder.get("attn_qk_norm_dim_scale") else decoder.number("attn_qk_norm_scale", 10.0)


def _slopes(decoder: Fields, heads: int, kv_heads: int) -> tuple[float, ...]:
    """ALiBi's slopes (arXiv:2108.12409, section 3): a geometric sequence, interleaved if not a power of two."""
    count = decoder.count("alibi_num_heads", heads)
    power = 2 ** math.floor(math.log2(count))

    def sequence(n: int) -> list[float]:
        return [2 ** (-8 / n * (i + 1)) for i in range(n)]

    slopes = sequence(power) + sequence(2 * power)[0::2][: count - power] + [0.0] * (heads - count)
    return tuple(slopes[head] for head in head_order(heads, kv_heads))


def head_order(heads: int, kv_heads: int) -> list[int]:
    """The library's query head h reads key-value head h % kv_heads, ours h // (heads / kv_heads): ours in turn."""
    return torch.arange(heads).view(-1, kv_heads).T.reshape(-1).tolist()


def transforms(config: DecoderConfig) -> dict[str, Transform]:
    """Norms add 1; rotation is of neighbours; query heads come in another order; positions are scaled."""
    heads, kv_heads, rotary = config.attention.heads, config.attention.kv_heads, config.attention.rotary
    order = head_order(heads, kv_heads)
    rotated = 0 if rotary is None else 2 * len(rotary.inverse_frequencies)

    def in_order(rows: Tensor) -> Tensor:
        by_head = rows.reshape(heads, -1, *rows.shape[1:])
        return by_head[order].reshape(rows.shape)

    def queries(rows: Tensor) -> Tensor:
        return split_halves(in_order(rows), heads, rotated)

    def norms(weight: Tensor, heads: int, order: list[int]) -> Tensor:
        scales = weight.reshape(heads, -1)[order]  # (H, D)
        return split_halves(scales.flatten(), heads, rotated).view(heads, -1)

    return {
        **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), plus_one),
        "position_embd": lambda table: table * config.dim**-0.5,
        "attn.q": queries,
        "attn.k": partial(split_halves, heads=kv_heads, rotated=rotated),
        "attn.output": lambda weight: in_order(weight.T).T.contiguous(),
        "attn.q_norm": partial(norms, heads=heads, order=order),
        "attn.k_norm": partial(norms, heads=kv_heads, order=list(range(kv_heads))),
    }


FAMILY = Family("", "", read_config, _NAMES, hf_transforms=transforms, rename=rename)
