"""Files in, tensors and metadata out. Knows nothing of torch modules or of model families."""

from __future__ import annotations

from pathlib import Path

from kvgen.checkpoint import gguf, hf, xtransformers
from kvgen.checkpoint.raw import RawCheckpoint, RawTensor, read_json_object
from kvgen.errors import CheckpointError, NotFoundError, UnsupportedError

__all__ = ["RawCheckpoint", "RawTensor", "read_checkpoint"]


def read_checkpoint(path: Path) -> RawCheckpoint:
    """Read the checkpoint at `path`: a GGUF file, a Hugging Face or x-transformers folder.

    Tensors stay on disk until they are read.

    Raises NotFoundError, CheckpointError for damaged files, UnsupportedError for what is neither of the two.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    if gguf.is_gguf(path):
        return gguf.read(path)
    raise UnsupportedError(f"{path}: not a GGUF file; give a .gguf file or a folder with config.json")


def _read_folder(folder: Path) -> RawCheckpoint:
    config_path = folder / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{folder}: has no config.json; give a .gguf file or a Hugging Face folder")
    config = read_json_object(config_path)
    if config.get("library") == xtransformers.LIBRARY:
        return xtransformers.read(folder, config)
    return hf.read(folder, config)
