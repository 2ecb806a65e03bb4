"""The result of every checkpoint reader: metadata and tensors, under the names in the file."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import Tensor

from kvgen.checkpoint.digest import SourceFile, read_stat
from kvgen.checkpoint.gguf_blocks import StoredBlocks
from kvgen.checkpoint.grouped import Grouped
from kvgen.errors import CheckpointError

MAX_TEXT_BYTES = 256 * 1024 * 1024  # the largest tokenizer.json in use is below 40 MB

_VOCABULARY = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")}

Format = Literal["gguf", "hf", "x-transformers"]


@dataclass(frozen=True)
class RawTensor:
    """A tensor that is still on disk.

    shape: in torch's order, slowest dimension first.
    type: the storage type in the file (`F32`, `BF16`, `Q4_1`, ...).
    nbytes: size in the file.
    read: return the tensor; quantized types are dequantized, to fp32 or a narrower dtype that is exact.
    release: drop the file's pages from memory, once the tensor is copied.
    read_grouped: return a quantized matrix as integer codes; None for other types.
    transposed: whether `read_grouped` returns the transpose, or that of each of several matrices.
    expands: whether the type is quantized, but has no integer codes that the kernels compute with.
    """

    shape: tuple[int, ...]
    type: str
    nbytes: int
    read: Callable[[], Tensor]
    release: Callable[[], None] = lambda: None
    read_grouped: Callable[[], Grouped | StoredBlocks | None] = lambda: None
    expands: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class RawCheckpoint:
    """An uninterpreted checkpoint.

    path: the GGUF file or the folder.
    metadata: a GGUF's key-value pairs, or a folder's config.json.
    files: the files that were read.
    note: what to tell the user; "" for nothing.
    """

    path: Path
    format: Format
    metadata: Mapping[str, Any]
    tensors: Mapping[str, RawTensor]
    files: tuple[SourceFile, ...] = ()
    note: str = ""

    def with_metadata(self, values: Mapping[str, Any]) -> RawCheckpoint:
        """Return it with further or other metadata."""
        return replace(self, metadata={**self.metadata, **values})

    def with_defaults(self, values: Mapping[str, Any]) -> RawCheckpoint:
        """Return it with metadata for what it leaves out or has as null."""
        given = {name: value for name, value in self.metadata.items() if value is not None}
        return replace(self, metadata={**values, **given})

    def without_vocabulary(self) -> RawCheckpoint:
        """Return it without a GGUF file's tokens, scores and merges, which take as much memory as the tokenizer."""
        return replace(self, metadata={name: value for name, value in self.metadata.items() if name not in _VOCABULARY})


def check_file(path: Path, *, max_bytes: int | None = None) -> None:
    """Raises CheckpointError if `path` is not a file (a pipe or a device may never end) or is too large.

    Links to files are allowed: the Hugging Face cache consists of them.
    """
    found = read_stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise CheckpointError(f"{path}: larger than {max_bytes} bytes; this is not a checkpoint file")


def refuse_tensor(folder: Path, name: str, problem: str) -> NoReturn:
    """Raise CheckpointError for one tensor of a folder."""
    raise CheckpointError(f"{folder}: tensor {name!r} {problem}")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises CheckpointError if it is missing, too large or malformed."""
    check_file(path, max_bytes=MAX_TEXT_BYTES)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must contain an object. Raises CheckpointError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must contain a JSON object")
    return content
