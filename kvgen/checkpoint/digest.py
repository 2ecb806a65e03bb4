"""SHA-256 digests of checkpoint files, stored in kvgen's cache folder.

A digest covers all bytes, since one changed weight changes the results. Blocks are hashed in parallel, about as fast as
a fast disk reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvgen.errors import CheckpointError
from kvgen.system import atomic_file, cache_dir

_BLOCK = 16 * 1024 * 1024
_SETTLED = 2 * 10**9  # ns; on any file system, later changes have a different timestamp


@dataclass(frozen=True)
class SourceFile:
    """A file that was read, and its device, inode, size in bytes and mtime in ns at that time."""

    path: Path
    stamp: tuple[int, ...]


def source_file(path: Path) -> SourceFile:
    """Describe a file as it is now. Raises CheckpointError if it cannot be read."""
    found = read_stat(path)
    return SourceFile(path.absolute(), (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


def digest_of(files: Iterable[SourceFile]) -> str:
    """Hash the names and bytes of files. Raises CheckpointError if one has changed since it was read."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.path.name}\0{_cached_digest(file)}\0".encode())
    return total.hexdigest()


def _cached_digest(file: SourceFile) -> str:
    if source_file(file.path) != file:
        raise CheckpointError(f"{file.path}: has changed since it was read; load the model again")
    changed = read_stat(file.path).st_ctime_ns  # unlike mtime, a program cannot set it
    stamp = [*file.stamp, changed]
    entry = cache_dir() / "digests" / hashlib.sha256(os.fsencode(file.path)).hexdigest()[:32]
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        value = json.loads(entry.read_bytes())
        if value["file"] == stamp:
            return str(value["sha256"])
    digest = _compute_digest(file)
    if time.time_ns() - changed > _SETTLED:
        with suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(entry) as cached:
                cached.write(json.dumps({"file": stamp, "sha256": digest}).encode())
    return digest


def _compute_digest(file: SourceFile) -> str:
    def hash_block(start: int) -> bytes:
        with file.path.open("rb") as data:
            data.seek(start)
            return hashlib.sha256(data.read(_BLOCK)).digest()

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            blocks = b"".join(pool.map(hash_block, range(0, file.stamp[2], _BLOCK)))
    except OSError as error:
        raise CheckpointError(f"{file.path}: cannot be read ({error.strerror})") from error
    return hashlib.sha256(blocks).hexdigest()


def read_stat(path: Path) -> os.stat_result:
    """Return `path.stat()`. Raises CheckpointError."""
    try:
        return path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
