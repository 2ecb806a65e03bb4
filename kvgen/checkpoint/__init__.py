"""Files in, tensors and metadata out. Knows nothing of torch modules or of model families."""

from __future__ import annotations

from pathlib import Path

from kvgen.checkpoint import gguf, hf
from kvgen.checkpoint.raw import RawCheckpoint, RawTensor
from kvgen.errors import NotFoundError, UnsupportedError

__all__ = ["RawCheckpoint", "RawTensor", "read_checkpoint"]


def read_checkpoint(path: Path) -> RawCheckpoint:
    """Read the checkpoint at `path`: a GGUF file or a Hugging Face folder. Tensors stay on disk until read.

    Raises NotFoundError, CheckpointError for damaged files, UnsupportedError for what is neither of the two.
    """
    if path.is_dir():
        return hf.read(path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    if gguf.is_gguf(path):
        return gguf.read(path)
    raise UnsupportedError(f"{path}: not a GGUF file; give a .gguf file or a folder with config.json")
