"""This machine: the folder that kvgen writes to, and how much memory there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
from platformdirs import user_cache_path

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def total_memory() -> int:
    """Bytes of the machine, or what this process may have of it."""
    return min([int(psutil.virtual_memory().total), *(most for most, _ in _bounds())])


def available_memory() -> int:
    """Bytes that this process can still take without others having to give any back."""
    return max(0, min([int(psutil.virtual_memory().available), *(most - used for most, used in _bounds())]))


# What a container or a service may take stands in the control groups of Linux, which no library in wide use reads:
# those that do are one person's each.
def _bounds() -> Iterator[tuple[int, int]]:
    """What each control group may take that this process is in, and what it has taken.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html.
    """
    for folder, limit, usage, cached in _groups():
        most, used = _number(folder / limit), _number(folder / usage)
        if most is not None and used is not None:
            yield most, used - _cached(folder / "memory.stat", cached)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Folders of control groups, each followed by those that it is in, and what their files are called."""
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
            yield folder, *names


def _cached(stat: Path, name: str) -> int:
    """Of what a group has taken, the pages of files that it can do without."""
    for line in _read(stat).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(file: Path) -> int | None:
    """None for `max`, and where there is no such file."""
    text = _read(file).strip()
    return int(text) if text.isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def cache_dir() -> Path:
    """The one place that kvgen writes to unasked: $KVGEN_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("KVGEN_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else user_cache_path("kvgen", appauthor=False)
