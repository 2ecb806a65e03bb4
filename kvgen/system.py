"""The machine: memory limits, the cache folder, atomic writes."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path, user_runtime_path

from kvgen.errors import KvgenError, UsageError, in_one_line

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def total_memory() -> int:
    """Return the bytes of memory that this process may use at most."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _memory_limits())])


def available_memory() -> int:
    """Return the bytes of memory that this process can still take without swapping."""
    import psutil  # here, because it takes time that short commands would spend in vain

    free = [limit - used for limit, used in _memory_limits()]
    return max(0, min([int(psutil.virtual_memory().available), *free]))


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) for each Linux control group that contains this process; psutil does not read them.

    See https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html.
    """
    for line in _read(_MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = _GROUPS / "memory"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            limit, used = (_read(folder / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():  # the limit may be "max"
                stat = dict(entry.partition(" ")[::2] for entry in _read(folder / "memory.stat").splitlines())
                yield int(limit), int(used) - int(stat.get(names[2], 0))  # pages of files can be reclaimed


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def cache_dir() -> Path:
    """Return $KVGEN_CACHE_DIR or the user's cache folder; kvgen writes nowhere else by itself."""
    return path_of_variable("KVGEN_CACHE_DIR") or user_cache_path("kvgen", appauthor=False)


def runtime_dir() -> Path:
    """Return the user's folder for sockets. Raises KvgenError if there is none, or others could open it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where the system has none, there is one in /tmp
            folder = user_runtime_path("kvgen", appauthor=False)
        for path in (*reversed(folder.parents), folder):
            path.mkdir(mode=0o700, exist_ok=True)  # not `parents=True`, which gives others access to what it makes
        status = folder.lstat()
    except OSError as error:
        raise KvgenError(f"no folder for sockets: {in_one_line(error)}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise KvgenError(f"{folder}: must be a folder that belongs to you and that nobody else can open")
    return folder


def path_of_variable(name: str) -> Path | None:
    """Return the path in an environment variable; None if it is unset or empty. Raises UsageError for `~nobody`."""
    chosen = os.environ.get(name)
    try:
        return Path(chosen).expanduser() if chosen else None
    except RuntimeError:
        raise UsageError(f"{name} is {chosen!r}: there is no such user") from None


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends; if it raises, `path` is unchanged. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix=".kvgen-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        with written.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, if the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
