"""Read checkpoint files into tensors and metadata. Knows no torch modules and no model families."""

from __future__ import annotations

from pathlib import Path

from kvgen.checkpoint import gguf, hf, xtransformers
from kvgen.checkpoint.raw import RawCheckpoint, RawTensor, read_json_object
from kvgen.errors import CheckpointError, NotFoundError

__all__ = ["RawCheckpoint", "RawTensor", "read_checkpoint"]


def read_checkpoint(path: Path) -> RawCheckpoint:
    """Read a GGUF file, or a Hugging Face or x-transformers folder. Tensors stay on disk until they are read.

    Raises NotFoundError, CheckpointError if a file is damaged, UnsupportedError for other formats.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return gguf.read(path)
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path}: has no config.json; give a .gguf file or a Hugging Face folder")
    config = read_json_object(path / "config.json")
    read = xtransformers.read if config.get("library") == xtransformers.LIBRARY else hf.read
    return read(path, config)
