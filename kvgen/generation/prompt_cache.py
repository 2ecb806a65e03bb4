"""Prompt caches: KV caches in files, so that a later process continues from them.

A safetensors file: `tokens`, and for each layer N `keys.N` and `values.N`, or `state.P.I.N`, part I of a recurrent
state after P positions. A file belongs to weights and arithmetic, not to a prompt: a loaded cache matches any text as
in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kvgen.backends.native import NativeBackend
from kvgen.checkpoint.digest import digest_of
from kvgen.checkpoint.hf import TYPE_NAMES, add_shard
from kvgen.checkpoint.raw import RawTensor
from kvgen.contract import Backend
from kvgen.errors import CacheError, CheckpointError, KvgenError, UsageError
from kvgen.loading.load import Loaded
from kvgen.model.cache import KVCache
from kvgen.system import atomic_file

_FORMAT = "2"


@dataclass(frozen=True)
class PromptCacheInfo:
    """Contents of a file that can be read without the model. nbytes: of all layers."""

    model: str
    numerics: str
    tokens: tuple[int, ...]
    layers: int
    dtype: str
    nbytes: int


def save_prompt_cache(path: str | Path, cache: KVCache, loaded: Loaded) -> None:
    """Write a cache to a file, atomically.

        >>> ids = loaded.tokenizer.encode("A long document. " * 20)
        >>> batch = kvgen.Batch(loaded)
        >>> _ = list(batch.complete(kvgen.Request(ids, max_tokens=1)))
        >>> kvgen.save_prompt_cache("document.cache", batch.cache, loaded)

    Raises KvgenError if the file cannot be written, UsageError if the model does not run on kvgen's decoder.
    """
    path, native = Path(path), _native(loaded.model)
    tensors = {"tokens": cache.tokens}
    for number, layer in enumerate(cache.held()):
        tensors |= {f"{name}.{number}": tensor for name, tensor in layer.tensors.items()}
    metadata = {
        "kvgen-prompt-cache": _FORMAT,
        "identity": identity_of(loaded),
        "model": _name(loaded),
        "numerics": native.numerics,
        "variant": str(cache.variant),
        "sha256": digest(tensors),
    }
    try:
        with atomic_file(path) as file:
            _write(file, tensors, metadata)
    except OSError as error:
        raise KvgenError(f"{path}: the prompt cache cannot be written ({error})") from error


def open_prompt_cache(path: Path, loaded: Loaded) -> KVCache | None:
    """Load a cache; None if the file does not exist yet. Raises UsageError if it could not be created."""
    _native(loaded.model)
    if path.exists():
        return load_prompt_cache(path, loaded)
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent} for a prompt cache")
    return None


def load_prompt_cache(path: str | Path, loaded: Loaded) -> KVCache:
    """Load a cache that `save_prompt_cache` or `--prompt-cache` wrote with the same weights and arithmetic.

        >>> batch = kvgen.Batch(loaded, kept=[kvgen.load_prompt_cache("document.cache", loaded)])
        >>> ids = loaded.tokenizer.encode("A long document. " * 20 + "In short,")
        >>> next(batch.complete(kvgen.Request(ids))).step.computed
        3

    Raises CacheError if the file is damaged or of another model, UsageError if `loaded` is not on kvgen's decoder.
    """
    path, native = Path(path), _native(loaded.model)
    metadata, tensors = _read(path)
    if metadata["identity"] != identity_of(loaded):
        raise CacheError(
            f"{path}: a prompt cache of {metadata['model']} ({_in_words(metadata['numerics'])}), "
            f"not of {_name(loaded)} ({_in_words(native.numerics)}); name another file"
        )
    tokens = tensors["tokens"].clone()
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < native.decoder.config.vocab_size:
        raise _damaged(path, "token ids outside the vocabulary")
    try:
        layers = ({name: tensor.to(native.device) for name, tensor in layer.items()} for layer in _layers(tensors))
        return native.restored(tokens, layers, int(metadata["variant"]))
    except (CacheError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"it does not fit the model ({error})") from error


def describe_prompt_cache(path: Path) -> PromptCacheInfo:
    """Return the contents of a file. Raises CacheError if it is damaged or not a prompt cache."""
    metadata, tensors = _read(path)
    parts = [tensors[name] for names in _layer_names(tensors).values() for name in names]
    return PromptCacheInfo(
        metadata["model"],
        _in_words(metadata["numerics"]),
        tuple(tensors["tokens"].flatten().tolist()),
        len(_layer_names(tensors)),
        ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in parts})),
        sum(tensor.nbytes for tensor in parts),
    )


def _name(loaded: Loaded) -> str:
    return f"{loaded.source} with {loaded.adapter}" if loaded.adapter else loaded.source


def _in_words(numerics: str) -> str:
    """Replace the default of --quantize, which keeps weights in their stored types, by its meaning."""
    return numerics.replace("weights auto", "weights as stored")


def _native(model: Backend) -> NativeBackend:
    if isinstance(model, NativeBackend):
        return model
    raise UsageError("a prompt cache needs kvgen's own decoder, and goes without --verify-cache")


class _LazyTensors(UserDict[str, Any]):
    """Tensors of a file, read on access; only those of the layer read last stay in memory. metadata: of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._read: list[RawTensor] = []
        self._layer = ""
        self.metadata = add_shard(self.data, path)

    def __getitem__(self, name: str) -> Tensor:
        layer = name.rpartition(".")[2]
        if layer != self._layer:
            for tensor in self._read:
                tensor.release()
            self._read, self._layer = [], layer
        self._read.append(self.data[name])
        return self._read[-1].read()


def _layer_names(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of each layer's tensors, by its number."""
    names: dict[str, list[str]] = {}
    for name in tensors:
        if name != "tokens":
            names.setdefault(name.rpartition(".")[2], []).append(name)
    return names


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each layer, without its number. Raises KeyError if one is missing."""
    names = _layer_names(tensors)
    for number in map(str, range(len(names))):
        yield {name.rpartition(".")[0]: tensors[name] for name in names[number]}


def _read(path: Path) -> tuple[dict[str, str], Mapping[str, Tensor]]:
    """Read metadata and tensors; check the format and the checksum."""
    try:
        tensors = _LazyTensors(path)
    except CheckpointError as error:
        raise CacheError(f"{path}: not a readable prompt cache ({error})") from error
    metadata = tensors.metadata
    if metadata.get("kvgen-prompt-cache") != _FORMAT:
        raise CacheError(f"{path}: not a prompt cache of this version of kvgen")
    if not {"identity", "model", "numerics", "variant", "sha256"} <= metadata.keys() or "tokens" not in tensors:
        raise _damaged(path, "an entry is missing")
    if tensors["tokens"].dtype != torch.int64 or tensors["tokens"].ndim != 2:
        raise _damaged(path, "invalid token ids")
    if metadata["sha256"] != digest(tensors):
        raise _damaged(path, "wrong checksum")
    return metadata, tensors


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the safetensors format; the library's own writer would copy the whole cache into contiguous memory."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # align the tensors
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _damaged(path: Path, reason: str) -> CacheError:
    return CacheError(f"{path}: the prompt cache is damaged: {reason}; remove it")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and contents."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        sha256.update(_bytes(tensor))
    return sha256.hexdigest()


def identity_of(loaded: Loaded) -> str:
    """Return a digest of weights and arithmetic. Token ids are compared, not text, so the tokenizer is left out."""
    numerics = _native(loaded.model).numerics
    if not loaded.files:
        raise UsageError("a prompt cache needs a model that kvgen.load read from files")
    return hashlib.sha256(f"{numerics}\0{digest_of(loaded.files)}".encode()).hexdigest()
