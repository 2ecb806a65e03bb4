"""Describe a checkpoint from its header, without reading weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvgen.backends.blueprint import draw_blueprint
from kvgen.checkpoint import RawCheckpoint, read_checkpoint
from kvgen.errors import CheckpointError, UnsupportedError, UsageError
from kvgen.hub.catalogue import Progress
from kvgen.hub.names import default_reference, no_progress, resolve
from kvgen.kernels.program import lacking
from kvgen.model.cache import cache_bytes, position_bytes, snapshot_bytes
from kvgen.model.config import DecoderConfig
from kvgen.model.decoder import Decoder
from kvgen.model.ffns import MLP, MoE
from kvgen.model.mixers import Attention, Mamba2, Mixer, Rotary, ShortConv
from kvgen.model.moe import used_share
from kvgen.tokenizer import Tokenizer, read_tokenizer


@dataclass(frozen=True)
class Inspection:
    """A description of a checkpoint.

    kind: its own name for its architecture: `model_type`, `general.architecture`, or the library.
    backend: `native` or `x-transformers`; None if kvgen cannot run it, for the reason in `obstacle`, else "".
    note: what to tell the user, such as that images are left out; "" for nothing.
    kernels_lack: the mechanisms that the kernels lack, so that it runs on torch; None if they have all.
    parameters: number of weights. active_parameters: of these, what one token uses: not the experts that it does not
        choose. nbytes: their size in the files. types: storage type -> bytes.
    config: of the native decoder, or None. mechanisms: the same in words, by subject.
    cache_bytes_per_token: keys and values of one more token in fp32, the default on a CPU. cache_bytes_full: at full
        context, where windows keep less. snapshot_bytes: the states of all recurrent layers after one position, in the
        same; 0 if there are none. None if unknown.
    vocabulary: size of the tokenizer; None if kvgen cannot read it, for the reason in `tokenizer_obstacle`, else "".
    """

    path: Path
    format: str
    kind: str
    backend: str | None
    obstacle: str
    note: str
    kernels_lack: str | None
    parameters: int
    active_parameters: int | None
    nbytes: int
    types: dict[str, int]
    config: DecoderConfig | None
    mechanisms: dict[str, str]
    cache_bytes_per_token: int | None
    cache_bytes_full: int | None
    snapshot_bytes: int | None
    vocabulary: int | None
    tokenizer_obstacle: str
    has_chat_template: bool


def inspect(reference: str | Path | None = None, *, progress: Progress = no_progress) -> Inspection:
    """Describe a checkpoint from its header. reference, progress: see `kvgen.load`.

    Raises NotFoundError, CheckpointError for damaged files, UnsupportedError for other files.
    """
    name = str(reference or default_reference())
    if ".py:" in name or name.endswith(".py"):
        raise UsageError(f"model {name!r} is a program, not a checkpoint; kvgen inspect does not run it")
    raw = read_checkpoint(resolve(name, progress=progress))
    decoder, obstacle = _read_decoder(raw)
    config = None if decoder is None else decoder.config
    parameters = sum(math.prod(tensor.shape) for tensor in raw.tensors.values())
    tokenizer, tokenizer_obstacle = _read_tokenizer(raw)
    types: Counter[str] = Counter()
    for tensor in raw.tensors.values():
        types[tensor.type] += tensor.nbytes
    context = None if config is None else config.context_length
    return Inspection(
        path=raw.path,
        format=raw.format,
        kind=str(raw.metadata.get({"gguf": "general.architecture", "hf": "model_type"}.get(raw.format, "library"))),
        backend="native" if config is not None else None if obstacle else raw.format,
        obstacle=obstacle,
        note=raw.note,
        kernels_lack=None if config is None else lacking(config),
        parameters=parameters,
        active_parameters=None if decoder is None else parameters - _idle_parameters(decoder),
        nbytes=sum(types.values()),
        types=dict(types.most_common()),
        config=config,
        mechanisms={} if config is None else mechanisms(config),
        cache_bytes_per_token=None if config is None else position_bytes(config),
        cache_bytes_full=None if config is None or context is None else cache_bytes(config, context),
        snapshot_bytes=None if config is None else snapshot_bytes(config),
        vocabulary=None if tokenizer is None else tokenizer.backend.get_vocab_size(),
        tokenizer_obstacle=tokenizer_obstacle,
        has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
    )


def _read_decoder(raw: RawCheckpoint) -> tuple[Decoder | None, str]:
    if raw.format == "x-transformers":
        return None, ""
    try:
        return draw_blueprint(raw).decoder, ""
    except UnsupportedError as error:
        return None, str(error)


def _idle_parameters(decoder: Decoder) -> int:
    sizes = decoder.named_parameters()
    return round(sum(parameter.numel() * (1 - used_share(decoder.config, name)) for name, parameter in sizes))


def _read_tokenizer(raw: RawCheckpoint) -> tuple[Tokenizer | None, str]:
    try:
        return read_tokenizer(raw), ""
    except (UnsupportedError, CheckpointError) as error:
        return None, str(error)


def mechanisms(config: DecoderConfig) -> dict[str, str]:
    """Describe a decoder in words, by subject."""
    norm = {"rms": "RMS norm", "layer": "layer norm"}[config.norm]
    places = {
        "attn_norm": "before attention",
        "post_attention_norm": "after attention",
        "ffn_norm": "before the MLP",
        "post_ffw_norm": "after the MLP",
    }
    qk_norms = {"head": "per head", "each-head": "per head, own weights", "all": "over all heads"}
    qk_norms["rotated-head"] = "per head, after rotation"
    attention = config.attentions[0] if config.attentions else Attention(0, 0, 0)
    described = {
        "layers": f"{len(config.layers)} of width {config.dim}" + (", attention and MLP in parallel" * config.parallel),
        **_mixers(config),
        "positions": _positions(config),
        "windows": _windows(config),
        "norms": f"{norm} " + ", ".join(text for name, text in places.items() if name in config.norms),
        **_ffns(config),
        "head": "tied to the embedding" if config.tied_head else "separate",
        "biases": ", ".join(sorted(config.biases)) or "none",
    }
    if attention.qk_norm is not None:
        described["query-key norm"] = f"{norm} {qk_norms[attention.qk_norm]}"
    caps = {"scores": attention.softcap, "logits": config.logit_softcap}
    if any(caps.values()):
        described["soft caps"] = ", ".join(f"{name} {cap:g}" for name, cap in caps.items() if cap)
    scales = {
        "attention": attention.scale or 1,
        "embedding": config.embedding_scale,
        "residual": config.residual_scale,
        "logits": config.logit_scale,
    }
    if any(scale != 1 for scale in scales.values()):
        described["scales"] = ", ".join(f"{name} {scale:.4g}" for name, scale in scales.items() if scale != 1)
    return described


def _mixers(config: DecoderConfig) -> dict[str, str]:
    """Describe the first mixer of each kind, and where some layers have another, how many have it."""
    mixers = {type(layer.mixer): layer.mixer for layer in reversed(config.layers)}
    counts = Counter(type(layer.mixer) for layer in config.layers)
    described = {}
    for kind, mixer in mixers.items():
        subject, text = _describe_mixer(mixer)
        described[subject] = text + f", in {counts[kind]} of {len(config.layers)} layers" * (len(mixers) > 1)
    return dict(sorted(described.items()))


def _describe_mixer(mixer: Mixer) -> tuple[str, str]:
    if isinstance(mixer, ShortConv):
        return "convolution", f"over {mixer.width} positions, {mixer.channels} channels"
    if isinstance(mixer, Mamba2):
        groups = f"{mixer.groups} group{'s' * (mixer.groups > 1)}"
        return "Mamba 2", f"{mixer.heads} heads of size {mixer.head_dim} in {groups}, states of size {mixer.size}"
    return "attention", f"{mixer.heads} heads of size {mixer.head_dim}, {mixer.kv_heads} key-value heads"


def _ffns(config: DecoderConfig) -> dict[str, str]:
    """Describe the feed-forward layers as `_mixers` does mixers."""
    counts = Counter(type(layer.ffn) for layer in config.layers)
    ffns = {type(layer.ffn): layer.ffn for layer in reversed(config.layers) if layer.ffn is not None}
    described = {}
    for kind, ffn in ffns.items():
        subject, text = ("MLP", _describe_mlp(ffn)) if isinstance(ffn, MLP) else ("experts", _describe_experts(ffn))
        described[subject] = text + f", in {counts[kind]} of {len(config.layers)} layers" * (len(counts) > 1)
    return dict(sorted(described.items()))


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
    kinds = [_describe_rotary(rotary, config.attention.head_dim) for rotary in config.rotaries]
    without = sum(isinstance(layer.mixer, Attention) and layer.mixer.rotary is None for layer in config.layers)
    if kinds and without:
        kinds.append(f"none in {without} of {len(config.layers)} layers")
    if config.learned_positions:
        kinds.append(f"learned, {config.learned_positions}")
    return "; ".join(kinds) or "none"


def _describe_rotary(rotary: Rotary, head_dim: int) -> str:
    rotated = 2 * len(rotary.inverse_frequencies)
    text = "rotary" if rotated == head_dim else f"rotary on {rotated} of {head_dim} dimensions"
    text += f", longest wavelength {2 * math.pi / min(rotary.inverse_frequencies):.3g} tokens"
    if rotary.scale != 1:
        text += f", scaled by {rotary.scale:.4g}"
    if rotary.long_frequencies:
        text += f", different frequencies beyond {rotary.short_length} tokens"
    return text


def _windows(config: DecoderConfig) -> str:
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, Attention)]
    counts = Counter(mixer.window for mixer in mixers if mixer.window is not None)
    return (
        ", ".join(f"{window} in {count} of {len(config.layers)} layers" for window, count in counts.items()) or "none"
    )


def as_data(inspection: Inspection) -> dict[str, Any]:
    """Return the inspection as JSON data, with null for ""."""
    data = {name: None if value == "" else value for name, value in vars(inspection).items()}
    config, nbytes, has_chat_template = (data.pop(name) for name in ("config", "nbytes", "has_chat_template"))
    data |= {"path": str(inspection.path), "bytes": nbytes, "chat_template": has_chat_template}
    if config is not None:
        data |= {
            "context_length": config.context_length,
            "layers": len(config.layers),
            "dim": config.dim,
            "heads": config.attention.heads if config.attentions else None,
            "kv_heads": config.attention.kv_heads if config.attentions else None,
            "head_dim": config.attention.head_dim if config.attentions else None,
            "ffn_dim": next((layer.ffn.width for layer in config.layers if isinstance(layer.ffn, MLP)), None),
            "experts": next((layer.ffn.router.experts for layer in config.layers if isinstance(layer.ffn, MoE)), None),
            "vocab_size": config.vocab_size,
            "windows": [getattr(layer.mixer, "window", None) for layer in config.layers],
        }
    return data
