"""Read Hugging Face folders: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvgen.checkpoint.digest import source_file
from kvgen.checkpoint.mapped import MappedFile
from kvgen.checkpoint.multimodal import text_part
from kvgen.checkpoint.quantization import read_quantized
from kvgen.checkpoint.raw import RawCheckpoint, RawTensor, check_file, read_json_object
from kvgen.errors import CheckpointError, UnsupportedError

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_INDEX = "model.safetensors.index.json"


def read(folder: Path, config: dict[str, Any]) -> RawCheckpoint:
    """Read a folder with its decoded config.json.

    Raises CheckpointError, or UnsupportedError if the weights are not in safetensors, or quantized in another way than
    `kvgen.checkpoint.quantization` reads.
    """
    tensors: dict[str, RawTensor] = {}
    shards = _find_shards(folder)
    files = tuple(source_file(file) for file in (folder / "config.json", *shards))
    for shard in shards:
        add_shard(tensors, shard)
    named = read_quantized(folder / "config.json", config, tensors)
    return text_part(RawCheckpoint(folder, "hf", config, named, files))


def _find_shards(folder: Path) -> list[Path]:
    index_path = folder / _INDEX
    if not index_path.exists():
        single = folder / "model.safetensors"
        if single.exists():
            return [single]
        found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        hint = f" ({found[0]} is a pickle, which can run code; kvgen does not load it)" if found else ""
        raise UnsupportedError(f"{folder}: has no model.safetensors and no {_INDEX}{hint}")
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index_path}: names a file outside the folder ({name!r})")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder}: the shard {name} is missing; download the checkpoint again")
    return [folder / name for name in names]


def add_shard(tensors: dict[str, RawTensor], path: Path) -> dict[str, str]:
    """Add the tensors of one safetensors file to `tensors`, and return its metadata. Raises CheckpointError."""
    check_file(path)
    found = source_file(path)
    try:
        shard: Any = safe_open(path, framework="pt")  # checks the header against the file size
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: of torch, which opens the file again
        if source_file(path) != found:
            return add_shard(tensors, path)
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    file = MappedFile(path)
    if source_file(path) != found:  # another process has replaced it meanwhile
        return add_shard(tensors, path)
    header_size = int.from_bytes(file.data[:8], "little")
    header = json.loads(file.data[8 : 8 + header_size])
    for name, view in slices.items():
        if name in tensors:
            raise CheckpointError(f"{path}: the tensor {name!r} is also in another shard")
        shape, kind = tuple(view.get_shape()), view.get_dtype()
        start, end = (8 + header_size + offset for offset in header[name]["data_offsets"])
        read_tensor = partial(_read_tensor, path, file, name, kind, shape, start)
        tensors[name] = RawTensor(shape, kind, end - start, read_tensor, partial(file.release, start, end - start))
    metadata: dict[str, str] = header.get("__metadata__") or {}
    return metadata


def _read_tensor(path: Path, file: MappedFile, name: str, kind: str, shape: tuple[int, ...], start: int) -> Tensor:
    if kind not in _TYPES:
        raise UnsupportedError(f"{path}: tensor {name!r} has the type {kind}")
    return file.tensor(_TYPES[kind], math.prod(shape), start).view(shape)
