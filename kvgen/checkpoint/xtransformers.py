"""Read x-transformers folders: a state dict, and a config.json with the library's arguments.

    {"library": "x-transformers", "wrapper": {...TransformerWrapper...}, "decoder": {...Decoder...},
     "tokenizer": "bytes"}

Leave out `tokenizer` if the folder has a tokenizer.json.
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
_WEIGHTS = ("model.safetensors", "model.pt")
_KEYS = {"library", "wrapper", "decoder", "tokenizer"}
_PREFIX = "net."  # in the state dict of an AutoregressiveWrapper


def read(folder: Path, config: dict[str, Any]) -> RawCheckpoint:
    """Read a folder with its decoded config.json. Raises CheckpointError."""
    path = folder / "config.json"
    unknown = sorted(config.keys() - _KEYS)
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0]!r} is not a key of an x-transformers config ({sorted(_KEYS)})")
    for key in ("wrapper", "decoder"):
        if not isinstance(config.get(key), dict):
            raise CheckpointError(f"{path}: {key} must be an object with the library's arguments")
    if config.get("tokenizer", "bytes") != "bytes":
        raise CheckpointError(f'{path}: tokenizer is {config["tokenizer"]!r}; use "bytes" or add a tokenizer.json')
    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise CheckpointError(f"{folder}: has neither {' nor '.join(_WEIGHTS)}")
    files = source_file(path), source_file(weights)
    tensors = _read_tensors(weights)
    if tensors and all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return RawCheckpoint(folder, "x-transformers", config, tensors, files)


def _read_tensors(path: Path) -> dict[str, RawTensor]:
    if path.suffix == ".safetensors":
        tensors: dict[str, RawTensor] = {}
        add_shard(tensors, path)
        return tensors
    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be loaded with weights_only=True ({in_one_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: not a state dict; save it with torch.save(model.state_dict(), path)")
    return {
        name: RawTensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), value.nbytes, value.detach)
        for name, value in state.items()
    }
