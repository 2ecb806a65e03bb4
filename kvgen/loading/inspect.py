"""What a checkpoint is, from its header alone: no tensor is read."""

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
from kvgen.model.cache import cache_bytes, position_bytes
from kvgen.model.config import DecoderConfig, Rotary
from kvgen.tokenizer import Tokenizer, read_tokenizer


@dataclass(frozen=True)
class Inspection:
    """What is known of a checkpoint.

    kind: what it calls itself: `model_type`, `general.architecture`, or the library.
    backend: what runs it; None if nothing does. obstacle: why not, or why not natively; "" if there is none.
    parameters: numbers in its tensors. nbytes: what they take in the files. types: bytes for each storage type.
    config: of the native decoder; None if that cannot run it. mechanisms: the same in words, subject to text.
    cache_bytes_per_token: of keys and values for one more token, at 4 bytes a number (fp32, the default on a CPU);
        cache_bytes_full: at the full context, where windows keep less; None if the config is not known.
    vocabulary: size of the tokenizer; None if kvgen cannot read it, which tokenizer_obstacle then explains.
    """

    path: Path
    format: str
    kind: str
    backend: str | None
    obstacle: str
    parameters: int
    nbytes: int
    types: dict[str, int]
    config: DecoderConfig | None
    mechanisms: dict[str, str]
    cache_bytes_per_token: int | None
    cache_bytes_full: int | None
    vocabulary: int | None
    tokenizer_obstacle: str
    has_chat_template: bool


def inspect(reference: str | Path | None = None, *, progress: Progress = no_progress) -> Inspection:
    """Read a checkpoint's header. reference, progress: as for `kvgen.load`.

    Raises NotFoundError, CheckpointError for damaged files, UnsupportedError for what is no checkpoint.
    """
    name = str(reference or default_reference())
    if ".py:" in name or name.endswith(".py"):
        raise UsageError(
            f"model {name!r} is a program, not a checkpoint: there is nothing to inspect without running it"
        )
    raw = read_checkpoint(resolve(name, progress=progress))
    config, obstacle = _native_config(raw)
    tokenizer, tokenizer_obstacle = _tokenizer(raw)
    types: Counter[str] = Counter()
    for tensor in raw.tensors.values():
        types[tensor.type] += tensor.nbytes
    context = None if config is None else config.context_length
    return Inspection(
        path=raw.path,
        format=raw.format,
        kind=_kind(raw),
        backend="native" if config is not None else "x-transformers" if raw.format == "x-transformers" else None,
        obstacle=obstacle,
        parameters=sum(math.prod(tensor.shape) for tensor in raw.tensors.values()),
        nbytes=sum(types.values()),
        types=dict(types.most_common()),
        config=config,
        mechanisms={} if config is None else mechanisms(config),
        cache_bytes_per_token=None if config is None else position_bytes(config),
        cache_bytes_full=None if config is None or context is None else cache_bytes(config, context),
        vocabulary=None if tokenizer is None else tokenizer.backend.get_vocab_size(),
        tokenizer_obstacle=tokenizer_obstacle,
        has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
    )


def mechanisms(config: DecoderConfig) -> dict[str, str]:
    """What the decoder is made of, in words."""
    norm = {"rms": "RMS norm", "layer": "layer norm"}[config.norm]
    places = {
        "attn_norm": "before attention",
        "post_attention_norm": "after attention",
        "ffn_norm": "before the MLP",
        "post_ffw_norm": "after the MLP",
    }
    attention, mlp = config.attention, config.mlp
    described = {
        "layers": f"{len(config.layers)} of width {config.dim}" + (", attention and MLP in parallel" * config.parallel),
        "attention": f"{attention.heads} heads of size {attention.head_dim}, {attention.kv_heads} of keys and values",
        "positions": _positions(config),
        "windows": _windows(config),
        "norms": f"{norm} " + ", ".join(text for name, text in places.items() if name in config.norms),
        "MLP": f"{mlp.activation}, {'gated' if mlp.gated else 'plain'}, width {mlp.width}",
        "head": "the embedding (tied)" if config.tied_head else "its own",
        "biases": ", ".join(sorted(config.biases)) or "none",
    }
    if attention.qk_norm is not None:
        described["query-key norm"] = f"{attention.qk_norm.kind}, over {attention.qk_norm.over}"
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


def _positions(config: DecoderConfig) -> str:
    kinds = [_rotary(rotary, config.attention.head_dim) for rotary in config.rotaries]
    still = sum(layer.mixer.rotary is None for layer in config.layers)
    if kinds and still:
        kinds.append(f"none in {still} of {len(config.layers)} layers")
    if config.learned_positions:
        kinds.append(f"learned, {config.learned_positions}")
    if config.attention.alibi:
        kinds.append("ALiBi")
    return "; ".join(kinds) or "none"


def _rotary(rotary: Rotary, head_dim: int) -> str:
    rotated = 2 * len(rotary.inverse_frequencies)
    text = "rotary" if rotated == head_dim else f"rotary on {rotated} of {head_dim} dimensions"
    text += f", slowest wave {2 * math.pi / min(rotary.inverse_frequencies):.3g} tokens"
    if rotary.scale != 1:
        text += f", scaled by {rotary.scale:.4g}"
    if rotary.long_frequencies:
        text += f", other frequencies beyond {rotary.short_length} tokens"
    return text


def _windows(config: DecoderConfig) -> str:
    counts = Counter(layer.mixer.window for layer in config.layers if layer.mixer.window is not None)
    described = [f"{window} in {count} of {len(config.layers)} layers" for window, count in counts.items()]
    return ", ".join(described) or "none"


def _kind(raw: RawCheckpoint) -> str:
    if raw.format == "x-transformers":
        return raw.format
    return str(raw.metadata.get("general.architecture" if raw.format == "gguf" else "model_type"))


def _native_config(raw: RawCheckpoint) -> tuple[DecoderConfig | None, str]:
    try:
        return draw_blueprint(raw).decoder.config, ""
    except UnsupportedError as error:
        return None, str(error)


def _tokenizer(raw: RawCheckpoint) -> tuple[Tokenizer | None, str]:
    try:
        return read_tokenizer(raw), ""
    except (UnsupportedError, CheckpointError) as error:
        return None, str(error)


def as_data(inspection: Inspection) -> dict[str, Any]:
    """The inspection as what JSON can hold. A text that is "" is null there."""
    config = inspection.config
    sizes = (
        {}
        if config is None
        else {
            "context_length": config.context_length,
            "layers": len(config.layers),
            "dim": config.dim,
            "heads": config.attention.heads,
            "kv_heads": config.attention.kv_heads,
            "head_dim": config.attention.head_dim,
            "ffn_dim": config.mlp.width,
            "vocab_size": config.vocab_size,
            "windows": [layer.mixer.window for layer in config.layers],
        }
    )
    return {
        "path": str(inspection.path),
        "format": inspection.format,
        "kind": inspection.kind,
        "backend": inspection.backend,
        "obstacle": inspection.obstacle or None,
        "parameters": inspection.parameters,
        "bytes": inspection.nbytes,
        "types": inspection.types,
        **sizes,
        "mechanisms": inspection.mechanisms,
        "cache_bytes_per_token": inspection.cache_bytes_per_token,
        "cache_bytes_full": inspection.cache_bytes_full,
        "vocabulary": inspection.vocabulary,
        "tokenizer_obstacle": inspection.tokenizer_obstacle or None,
        "chat_template": inspection.has_chat_template,
    }
