"""x-transformers folders: config.json with the library's arguments, and a state dict.

    {"library": "x-transformers", "wrapper": {...TransformerWrapper...}, "decoder": {...Decoder...},
     "tokenizer": "bytes"}

`tokenizer` is left out where a tokenizer.json lies beside it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from kvgen.checkpoint.digest import source_file
from kvgen.checkpoint.hf import add_shard
from kvgen.checkpoint.raw import RawCheckpoint, RawTensor, check_file
from kvgen.errors import CheckpointError, in_one_line

LIBRARY = "x-transformers"
_KEYS = {"library", "wrapper", "decoder", "tokenizer"}
_PREFIX = "net."  # of a state dict that was saved from an AutoregressiveWrapper


def read(folder: Path, config: dict[str, Any]) -> RawCheckpoint:
    """Read a folder whose config.json, `config`, names this library. Raises CheckpointError."""
    path = folder / "config.json"
    unknown = sorted(config.keys() - _KEYS)
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0]!r} is not a key of an x-transformers config ({sorted(_KEYS)})")
    for key in ("wrapper", "decoder"):
        if not isinstance(config.get(key), dict):
            raise CheckpointError(f"{path}: {key} must be an object with the library's arguments")
    if config.get("tokenizer", "bytes") != "bytes":
        raise CheckpointError(f'{path}: tokenizer is {config["tokenizer"]!r}; it can be "bytes", or a tokenizer.json')
    weights = _weights(folder)
    files = source_file(path), source_file(weights)
    tensors = _tensors(weights)
    if tensors and all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return RawCheckpoint(folder, "x-transformers", config, tensors, files)


def _weights(folder: Path) -> Path:
    for name in ("model.safetensors", "model.pt"):
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"{folder}: has neither model.safetensors nor model.pt")


def _tensors(path: Path) -> dict[str, RawTensor]:
    tensors: dict[str, RawTensor] = {}
    if path.suffix == ".safetensors":
        add_shard(tensors, path)
        return tensors
    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a state dict that can be loaded safely ({in_one_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: not a state dict; save it with torch.save(model.state_dict(), path)")
    return {name: _in_memory(tensor) for name, tensor in state.items()}


def _in_memory(tensor: torch.Tensor) -> RawTensor:
    return RawTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes, lambda: tensor)
