"""What the bytes of a checkpoint's files are: digests, remembered in kvgen's cache folder.

A digest is of all bytes, since a change of a single weight changes what a model computes. SHA-256 of blocks, side by
side, takes about as long as reading a file from a fast disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvgen.errors import CheckpointError
from kvgen.system import cache_dir

_BLOCK = 16 * 1024 * 1024
_SETTLED = 2 * 10**9  # nanoseconds after which another change of a file gets another time, on any file system


@dataclass(frozen=True)
class SourceFile:
    """A file that a checkpoint was read from, and how it was then. stamp: device, inode, size, time of its change."""

    path: Path
    stamp: tuple[int, ...]


def source_file(path: Path) -> SourceFile:
    """A file as it is now. Raises CheckpointError."""
    found = _stat(path)
    return SourceFile(path.absolute(), (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


def digest_of(files: Iterable[SourceFile]) -> str:
    """Of the names and all bytes of files. Raises CheckpointError if one is not any more what was read."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.path.name}\0{_remembered(file)}\0".encode())
    return whole.hexdigest()


def _remembered(file: SourceFile) -> str:
    """The digest of one file, from the cache folder if it has it."""
    if source_file(file.path) != file:
        raise CheckpointError(f"{file.path}: has changed since it was read; load the model again")
    changed = _stat(file.path).st_ctime_ns  # which, other than the time in the stamp, nobody can set
    known = [*file.stamp, changed]
    note = cache_dir() / "digests" / hashlib.sha256(os.fsencode(file.path)).hexdigest()[:32]
    with suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads(note.read_bytes())
        if value["file"] == known:
            return str(value["sha256"])
    digest = _digest(file)
    if time.time_ns() - changed > _SETTLED:
        _remember(note, {"file": known, "sha256": digest})
    return digest


def _digest(file: SourceFile) -> str:
    starts = range(0, file.stamp[2], _BLOCK)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            blocks = b"".join(pool.map(lambda start: _block(file.path, start), starts))
    except OSError as error:
        raise CheckpointError(f"{file.path}: cannot be read ({error.strerror})") from error
    return hashlib.sha256(blocks).hexdigest()


def _block(path: Path, start: int) -> bytes:
    with path.open("rb") as data:
        data.seek(start)
        return hashlib.sha256(data.read(_BLOCK)).digest()


def _remember(note: Path, value: dict[str, object]) -> None:
    """Write it at once; where that cannot be, the digest is computed again next time."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=note.parent) as folder:
            written = Path(folder) / note.name
            written.write_text(json.dumps(value))
            written.replace(note)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
