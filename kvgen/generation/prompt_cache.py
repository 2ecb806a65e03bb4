"""A KV cache as a file, for a later process to go on from.

A safetensors file: `tokens`, and for each layer `keys.N`, `values.N` and, in the metadata, the position that they begin
at. It belongs to weights and arithmetic, not to a text: the cache finds what of a text it has seen, as in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvgen.backends.native import NativeBackend
from kvgen.checkpoint.digest import digest_of
from kvgen.checkpoint.hf import TYPE_NAMES, add_shard
from kvgen.checkpoint.raw import RawTensor
from kvgen.contract import Backend
from kvgen.errors import CacheError, CheckpointError, KvgenError, UsageError
from kvgen.loading.load import Loaded
from kvgen.model.cache import KVCache
from kvgen.model.states import KeyValues

_FORMAT = "1"


@dataclass(frozen=True)
class PromptCacheInfo:
    """What is known of a file without the model. nbytes: of keys and values."""

    model: str
    numerics: str
    tokens: tuple[int, ...]
    layers: int
    dtype: str
    nbytes: int


def save_prompt_cache(path: Path, cache: KVCache, loaded: Loaded) -> None:
    """Write the file at once: it is whole or not there. Raises KvgenError if it cannot be written."""
    native = _native(loaded.model)
    rooms = cache.held()
    tensors = {"tokens": cache.tokens}
    for number, room in enumerate(rooms):
        tensors |= {f"keys.{number}": room.keys, f"values.{number}": room.values}
    metadata = {
        "kvgen-prompt-cache": _FORMAT,
        "identity": _identity(loaded),
        "model": loaded.source,
        "numerics": native.numerics,
        "variant": str(cache.variant),
        "first": json.dumps([room.first for room in rooms]),
        "sha256": digest(tensors),
    }
    try:
        with tempfile.TemporaryDirectory(prefix=".kvgen-", dir=path.parent) as folder:
            written = Path(folder) / path.name
            with written.open("wb") as file:
                _write(file, tensors, metadata)
                file.flush()
                os.fsync(file.fileno())
            written.replace(path)
    except OSError as error:
        raise KvgenError(f"{path}: the prompt cache cannot be written ({error})") from error


def open_prompt_cache(path: Path, loaded: Loaded) -> KVCache | None:
    """What `load_prompt_cache` finds; None where there is no file yet, and one can be written.

    Raises UsageError where it cannot.
    """
    _native(loaded.model)
    if path.exists():
        return load_prompt_cache(path, loaded)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent} for a prompt cache")
    return None


def load_prompt_cache(path: Path, loaded: Loaded) -> KVCache:
    """The cache of a file that these weights and this arithmetic wrote.

    Raises CacheError for a file that is damaged or belongs to others, UsageError for a model whose cache is no KVCache.
    """
    native = _native(loaded.model)
    metadata, tensors = _read(path)
    if metadata["identity"] != _identity(loaded):
        raise CacheError(
            f"{path}: a prompt cache of {metadata['model']} ({metadata['numerics']}), not of {loaded.source} "
            f"({native.numerics}); name another file"
        )
    tokens = tensors["tokens"].clone()
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < native.decoder.config.vocab_size:
        raise _damaged(path, "token ids outside the vocabulary")
    try:
        rooms = (
            KeyValues(tensors[f"keys.{n}"].to(native.device), tensors[f"values.{n}"].to(native.device), int(first))
            for n, first in enumerate(json.loads(metadata["first"]))
        )
        return native.restored(tokens.to(native.device), rooms, int(metadata["variant"]))
    except (CacheError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"it does not fit the model ({error})") from error


def describe_prompt_cache(path: Path) -> PromptCacheInfo:
    """What a file holds. Raises CacheError for one that is damaged or no prompt cache."""
    metadata, tensors = _read(path)
    parts = [tensors[name] for name in tensors if name != "tokens"]
    return PromptCacheInfo(
        metadata["model"],
        metadata["numerics"],
        tuple(tensors["tokens"].flatten().tolist()),
        len(parts) // 2,
        ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in parts})),
        sum(tensor.nbytes for tensor in parts),
    )


def _native(model: Backend) -> NativeBackend:
    if isinstance(model, NativeBackend):
        return model
    raise UsageError("a prompt cache needs kvgen's own decoder, and goes without --verify-cache")


class _Stored(Mapping[str, Tensor]):
    """Tensors of a file, of which the two that were read last are in memory: keys and values of a layer."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, RawTensor] = {}
        self._read: list[RawTensor] = []
        add_shard(self._tensors, path)

    def __getitem__(self, name: str) -> Tensor:
        self._read.append(self._tensors[name])
        if len(self._read) > 2:
            self._read.pop(0).release()
        return self._read[-1].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read(path: Path) -> tuple[dict[str, str], Mapping[str, Tensor]]:
    """Metadata and tensors of a file that says what it is, and whose content is what was written."""
    try:
        tensors = _Stored(path)
        file: Any = safe_open(path, framework="pt")
        metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError, CheckpointError) as error:
        raise CacheError(f"{path}: no readable prompt cache ({error})") from error
    if metadata.get("kvgen-prompt-cache") != _FORMAT:
        raise CacheError(f"{path}: no prompt cache of this version of kvgen")
    wanted = {"identity", "model", "numerics", "variant", "first", "sha256"}
    if not wanted <= metadata.keys() or "tokens" not in tensors:
        raise _damaged(path, "something is missing")
    if tensors["tokens"].dtype != torch.int64 or tensors["tokens"].ndim != 2:
        raise _damaged(path, "its tokens are none")
    if metadata["sha256"] != digest(tensors):
        raise _damaged(path, "its content is not what was written")
    return metadata, tensors


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """In the format of safetensors, whose own writer wants all tensors in contiguous memory: a copy of the cache."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # which aligns what follows
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _damaged(path: Path, why: str) -> CacheError:
    return CacheError(f"{path}: the prompt cache is damaged: {why}; remove it")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of what a file holds, names and shapes included."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        whole.update(_bytes(tensor))
    return whole.hexdigest()


def _identity(loaded: Loaded) -> str:
    """Weights and arithmetic. The tokenizer does not matter: token ids are compared, not text."""
    numerics = _native(loaded.model).numerics
    if not loaded.files:
        raise UsageError("a prompt cache needs a model that was read from files, as `kvgen.load` does")
    return hashlib.sha256(f"{numerics}\0{digest_of(loaded.files)}".encode()).hexdigest()
