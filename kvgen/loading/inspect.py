"""Describe a checkpoint from its header, without reading weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvgen.backends.adapted import adapt
from kvgen.backends.adapter import Adapter, read_adapter
from kvgen.checkpoint import RawCheckpoint, read_checkpoint
from kvgen.errors import CheckpointError, UnsupportedError, UsageError
from kvgen.hub.catalogue import Progress
from kvgen.hub.names import default_reference, no_progress, resolve
from kvgen.kernels.build import available_variant
from kvgen.kernels.lacking import lacking
from kvgen.kernels.processors import NATIVE, asked_variant
from kvgen.loading.mechanisms import mechanisms
from kvgen.model.cache import attentions, cache_bytes, position_bytes, snapshot_bytes
from kvgen.model.config import DecoderConfig
from kvgen.model.decoder import Decoder
from kvgen.model.ffns import MLP, MoE
from kvgen.model.moe import used_share
from kvgen.tokenizer import Tokenizer, read_tokenizer


@dataclass(frozen=True)
class Inspection:
    """A description of a checkpoint.

    kind: its own name for its architecture: `model_type`, `general.architecture`, or the library.
    backend: `native` or `x-transformers`; None if kvgen cannot run it, for the reason in `obstacle`, else "".
    note: what to tell the user, such as that images are left out; "" for nothing.
    adapter: the adapter that was given, or None. Sizes are those of the checkpoint without it.
    kernels_lack: the mechanisms that the kernels lack, so that it runs on torch; None if they have all.
    cpu_engine: what computes on a CPU in float32; None if it is not the native decoder.
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
    adapter: Adapter | None
    kernels_lack: str | None
    cpu_engine: str | None
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


def inspect(
    reference: str | Path | None = None, *, adapter: str | Path | None = None, progress: Progress = no_progress
) -> Inspection:
    """Describe a checkpoint from its header. reference, adapter, progress: see `kvgen.load`.

    Raises NotFoundError, CheckpointError for damaged files, UnsupportedError for other files.
    """
    name = str(reference or default_reference())
    if ".py:" in name or name.endswith(".py"):
        raise UsageError(f"model {name!r} is a program, not a checkpoint; kvgen inspect does not run it")
    raw = read_checkpoint(resolve(name, progress=progress))
    changes = None if adapter is None else read_adapter(adapter)
    decoder, obstacle = _read_decoder(raw, changes)
    config = None if decoder is None else decoder.config
    kernels_lack = None if config is None else lacking(config)
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
        adapter=changes,
        kernels_lack=kernels_lack,
        cpu_engine=None if config is None else _cpu_engine(kernels_lack),
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


def _read_decoder(raw: RawCheckpoint, adapter: Adapter | None) -> tuple[Decoder | None, str]:
    if raw.format == "x-transformers":
        return None, "" if adapter is None else f"{raw.path} runs in the x-transformers library, which takes no adapter"
    try:
        return adapt(raw, adapter).blueprint.decoder, ""
    except UnsupportedError as error:
        return None, str(error)


def _cpu_engine(kernels_lack: str | None) -> str:
    if kernels_lack is not None:
        return f"torch (kernels lack: {kernels_lack})"
    try:
        return available_variant().engine
    except UnsupportedError as error:
        if asked_variant() != NATIVE:
            raise
        return f"torch ({error})"


def _idle_parameters(decoder: Decoder) -> int:
    sizes = decoder.named_parameters()
    return round(sum(parameter.numel() * (1 - used_share(decoder.config, name)) for name, parameter in sizes))


def _read_tokenizer(raw: RawCheckpoint) -> tuple[Tokenizer | None, str]:
    try:
        return read_tokenizer(raw), ""
    except (UnsupportedError, CheckpointError) as error:
        return None, str(error)


def as_data(inspection: Inspection) -> dict[str, Any]:
    """Return the inspection as JSON data, with null for ""."""
    data = {name: None if value == "" else value for name, value in vars(inspection).items()}
    config, nbytes, has_chat_template = (data.pop(name) for name in ("config", "nbytes", "has_chat_template"))
    data["adapter"] = None if inspection.adapter is None else inspection.adapter.as_data()
    data |= {"path": str(inspection.path), "bytes": nbytes, "chat_template": has_chat_template}
    if config is not None:
        attention = next(iter(attentions(config)), None)
        data |= {
            "context_length": config.context_length,
            "layers": len(config.layers),
            "dim": config.dim,
            "heads": attention.heads if attention else None,
            "kv_heads": attention.stored[0] if attention else None,
            "head_dim": attention.head_dim if attention else None,
            "ffn_dim": next((layer.ffn.width for layer in config.layers if isinstance(layer.ffn, MLP)), None),
            "experts": next((layer.ffn.router.experts for layer in config.layers if isinstance(layer.ffn, MoE)), None),
            "vocab_size": config.vocab_size,
            "windows": [getattr((*layer.mixers, layer.mixer)[0], "window", None) for layer in config.layers],
        }
    return data
