"""Describe a decoder in words."""

from __future__ import annotations

import math
from collections import Counter

from kvgen.model.cache import attentions
from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MLPAndExperts, MoE, SparseMLP
from kvgen.model.mixers import (
    Attention,
    DeltaNet,
    LatentAttention,
    Mamba,
    Mamba2,
    Mixer,
    Rotary,
    SharedAttention,
    ShortConv,
)


def mechanisms(config: DecoderConfig) -> dict[str, str]:
    """Describe a decoder by subject."""
    norm = {"rms": "RMS norm", "layer": "layer norm"}[config.norm]
    places = {
        "attn_norm": "before attention",
        "post_attention_norm": "after attention",
        "ffn_norm": "before the MLP",
        "post_ffw_norm": "after the MLP",
    }
    if any(layer.mixer is None for layer in config.layers):
        places["attn_norm"] = "before each layer"
    qk_norms = {"head": "per head", "each-head": "per head, own weights", "all": "over all heads"}
    qk_norms["rotated-head"] = "per head, after rotation"
    attention = config.attentions[0] if config.attentions else Attention(0, 0, 0)
    scale = next((mixer.scale for mixer in attentions(config)), None)
    described = {
        "layers": f"{len(config.layers)} of width {config.dim}{_parallel(config)}",
        **_mixers(config),
        "positions": _positions(config),
        "windows": _windows(config),
        "norms": f"{norm} " + ", ".join(text for name, text in places.items() if name in config.norms),
        **_ffns(config),
        **_residual(config),
        "head": "tied to the embedding" if config.tied_head else "separate",
        "biases": ", ".join(sorted(config.biases)) or "none",
    }
    if attention.qk_norm is not None:
        described["query-key norm"] = f"{norm} {qk_norms[attention.qk_norm]}"
    caps = {"scores": attention.softcap, "logits": config.logit_softcap}
    if any(caps.values()):
        described["soft caps"] = ", ".join(f"{name} {cap:g}" for name, cap in caps.items() if cap)
    scales = {
        "attention": scale or 1,
        "embedding": config.embedding_scale,
        "residual": config.residual_scale,
        "logits": config.logit_scale,
    }
    if any(scale != 1 for scale in scales.values()):
        described["scales"] = ", ".join(f"{name} {scale:.4g}" for name, scale in scales.items() if scale != 1)
    return described


def _parallel(config: DecoderConfig) -> str:
    mixers = ", mixers in parallel" * any(len(layer.mixers) > 1 for layer in config.layers)
    return mixers + ", attention and MLP in parallel" * config.parallel


def _mixers(config: DecoderConfig) -> dict[str, str]:
    """Describe the mixers by subject, and how many layers have each, if not all do."""
    parts = [_describe_mixer(mixer) for mixer in config.mixers]
    for layer in config.layers:
        if isinstance(layer.mixer, SharedAttention):
            sizes = f"{layer.mixer.attention.heads} heads of size {layer.mixer.attention.head_dim}"
            parts.append(("attention", f"{sizes}, with keys and values of an earlier layer"))
    return _by_subject(parts, len(config.layers))


def _by_subject(parts: list[tuple[str, str]], layers: int) -> dict[str, str]:
    described: dict[str, list[str]] = {}
    for (subject, text), count in Counter(parts).items():
        described.setdefault(subject, []).append(text + f", in {count} of {layers} layers" * (count < layers))
    return {subject: "; ".join(texts) for subject, texts in sorted(described.items())}


def _describe_mixer(mixer: Mixer) -> tuple[str, str]:
    if isinstance(mixer, ShortConv):
        return "convolution", f"over {mixer.width} positions, {mixer.channels} channels"
    if isinstance(mixer, Mamba):
        return "Mamba", f"{mixer.inner} channels, states of size {mixer.size}, time steps of rank {mixer.rank}"
    if isinstance(mixer, Mamba2):
        groups = f"{mixer.groups} group{'s' * (mixer.groups > 1)}"
        return "Mamba 2", f"{mixer.heads} heads of size {mixer.head_dim} in {groups}, states of size {mixer.size}"
    if isinstance(mixer, LatentAttention):
        sizes = f"{mixer.heads} heads of size {mixer.head_dim}, values of size {mixer.value_dim}"
        return "MLA", f"latent attention, {sizes}; caches {mixer.latent_dim} + {mixer.rotated} numbers a token"
    if isinstance(mixer, DeltaNet):
        keys = f"{mixer.key_heads} key heads of size {mixer.key_dim}"
        return "gated delta net", f"{mixer.heads} heads of size {mixer.value_dim}, {keys}"
    heads = f"{mixer.heads} heads of size {mixer.head_dim}, {mixer.kv_heads} key-value heads"
    heads += ", values normalized" * mixer.value_norm + ", keys as values" * mixer.keys_as_values
    return "attention", heads + ", a gate on the output" * mixer.output_gate + ", sinks" * mixer.sinks


def _ffns(config: DecoderConfig) -> dict[str, str]:
    """Describe the feed-forward layers as `_mixers` does mixers."""
    return _by_subject([_describe_ffn(layer.ffn) for layer in config.layers if layer.ffn], len(config.layers))


def _describe_ffn(ffn: MLP | MoE | MLPAndExperts | SparseMLP) -> tuple[str, str]:
    if isinstance(ffn, SparseMLP):
        return "MLP", f"{_describe_mlp(ffn.mlp)}, gates above {ffn.deviations:.3g} standard deviations"
    if isinstance(ffn, MLPAndExperts):
        return "experts", f"{_describe_experts(MoE(ffn.router, ffn.expert))}; beside an MLP of width {ffn.mlp.width}"
    return ("MLP", _describe_mlp(ffn)) if isinstance(ffn, MLP) else ("experts", _describe_experts(ffn))


def _residual(config: DecoderConfig) -> dict[str, str]:
    """Describe what is added to the residual stream besides mixers and feed-forward layers."""
    parts = []
    if config.altup is not None:
        parts.append(f"{config.altup.streams} streams (AltUp)")
    if config.laurel_rank:
        parts.append(f"LAuReL of rank {config.laurel_rank}")
    if config.layer_inputs is not None:
        parts.append(f"{config.layer_inputs.width} inputs of each layer, by token")
    if config.block_scales:
        parts.append("a scale for each layer")
    return {"residual": ", ".join(parts)} if parts else {}


def _describe_mlp(mlp: MLP) -> str:
    return f"{mlp.activation}, {'gated' if mlp.gated else 'not gated'}, width {mlp.width}"


def _describe_experts(moe: MoE) -> str:
    router = moe.router
    text = f"{router.active} of {router.experts}"
    if router.active_groups < router.groups:
        text += f" in {router.active_groups} of {router.groups} groups"
    if moe.shared is not None:
        text += f", and a shared one of width {moe.shared.width}" + " behind a gate" * moe.shared_gate
    return f"{text}; {_describe_mlp(moe.expert)}; weighed by {router.scores.replace('_', ' ')}"


def _positions(config: DecoderConfig) -> str:
    sizes = {rotary: mixer.head_dim for mixer in reversed(attentions(config)) for rotary in mixer.rotaries}
    kinds = [_describe_rotary(rotary, sizes[rotary]) for rotary in config.rotaries]
    without = sum(isinstance(mixer, Attention) and mixer.rotary is None for mixer in config.mixers)
    if kinds and without:
        kinds.append(f"none in {without} of {len(config.layers)} layers")
    if config.learned_positions:
        kinds.append(f"learned, {config.learned_positions}")
    return "; ".join(kinds) or "none"


def _describe_rotary(rotary: Rotary, head_dim: int) -> str:
    frequencies = [frequency for frequency in rotary.inverse_frequencies if frequency]
    rotated = 2 * len(frequencies)
    if not rotated:
        return "none"
    text = "rotary" if rotated == head_dim else f"rotary on {rotated} of {head_dim} dimensions"
    text += f", longest wavelength {2 * math.pi / min(frequencies):.3g} tokens"
    if rotary.scale != 1:
        text += f", scaled by {rotary.scale:.4g}"
    if rotary.long_frequencies:
        text += f", different frequencies beyond {rotary.short_length} tokens"
    return text


def _windows(config: DecoderConfig) -> str:
    windows = [mixer.window for mixer in config.mixers if isinstance(mixer, Attention)]
    windows += [layer.mixer.window for layer in config.layers if isinstance(layer.mixer, SharedAttention)]
    counts = Counter(window for window in windows if window is not None)
    return (
        ", ".join(f"{window} in {count} of {len(config.layers)} layers" for window, count in counts.items()) or "none"
    )
