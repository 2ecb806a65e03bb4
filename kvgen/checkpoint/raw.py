"""What every checkpoint reader returns: metadata and tensors under the names that the file gives them."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from kvgen.checkpoint.digest import SourceFile
from kvgen.checkpoint.grouped import Grouped
from kvgen.errors import CheckpointError

MAX_TEXT_BYTES = 256 * 1024 * 1024  # the largest tokenizer.json in use is below 40 MB

Format = Literal["gguf", "hf", "x-transformers"]


def _nothing() -> None:
    """What there is to release of a tensor in memory, and to read of one that has no groups."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor that is still on disk.

    shape: as torch sees it, slowest dimension first.
    type: the name of its storage type in the file (`F32`, `BF16`, `Q4_1`, ...).
    nbytes: what it takes in the file.
    read: returns the tensor; blocks of a quantized type are dequantized to fp32.
    read_grouped: returns a matrix of a quantized type as the integers that it is made of; None for other types.
    release: gives back the memory that reading took of the file's own, once a copy of the tensor is all that is
        wanted.
    """

    shape: tuple[int, ...]
    type: str
    nbytes: int
    read: Callable[[], Tensor]
    release: Callable[[], None] = _nothing
    read_grouped: Callable[[], Grouped | None] = _nothing


@dataclass(frozen=True)
class RawCheckpoint:
    """A checkpoint as its files have it.

    path: the GGUF file or the folder.
    metadata: a GGUF's key-value pairs, or the content of a folder's config.json.
    files: all that metadata and tensors were read from.
    """

    path: Path
    format: Format
    metadata: Mapping[str, Any]
    tensors: Mapping[str, RawTensor]
    files: tuple[SourceFile, ...] = ()


def check_file(path: Path, *, most: int | None = None) -> None:
    """Raises CheckpointError for what is no file, such as a pipe or a device that never ends, or has more than `most`
    bytes.

    A link to a file is one: the caches of Hugging Face are made of them, and kvgen only reads.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path}: not a file")
    if most is not None and found.st_size > most:
        raise CheckpointError(f"{path}: larger than {most} bytes; this is no checkpoint file")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError if it is missing, too large or malformed."""
    check_file(path, most=MAX_TEXT_BYTES)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that must hold an object. Raises CheckpointError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content
