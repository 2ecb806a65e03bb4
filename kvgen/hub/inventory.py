"""List and remove the models of the catalogue and of the Hugging Face cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvgen.errors import KvgenError, NotFoundError, UsageError
from kvgen.hub import catalogue
from kvgen.hub.catalogue import CATALOGUE
from kvgen.hub.names import is_whole
from kvgen.system import cache_dir

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo


@dataclass(frozen=True)
class Entry:
    """A model and its files.

    source: `catalogue`, or `hub` for a repository in the Hugging Face cache. path: None if not downloaded.
    nbytes: size on disk or of the download. licence: SPDX name; "" if unknown. whole: whether no file is missing.
    """

    name: str
    source: str
    path: Path | None
    nbytes: int
    licence: str
    whole: bool


def list_models() -> list[Entry]:
    """Return the models of the catalogue and of the Hugging Face cache."""
    folder = cache_dir() / "models"
    entries = []
    for known in CATALOGUE.values():
        path = catalogue.find(known, folder)
        entries.append(Entry(known.name, "catalogue", path, known.size, known.licence, path is not None))
    return entries + [entry for entry, _ in _hub_entries()]


def remove(name: str) -> Entry:
    """Remove a model from kvgen's cache or the Hugging Face cache, and return what was removed.

    Raises NotFoundError if it is in neither, UsageError if an installed package owns the file.
    """
    folder = cache_dir() / "models"
    if known := CATALOGUE.get(name):
        path = folder / known.file_name
        try:
            catalogue.sweep(folder)
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            if catalogue.find(known, folder) is None:
                raise NotFoundError(f"model {name!r} is not in {folder}") from None
            raise UsageError(f"model {name!r} is part of an installed package: pip uninstall {known.package}") from None
        except OSError as error:
            raise KvgenError(f"{path}: cannot be removed ({error.strerror})") from error
        return Entry(name, "catalogue", path, size, known.licence, size == known.size)
    for entry, revisions in _hub_entries():
        if entry.name == name:
            _scan().delete_revisions(*revisions).execute()
            return entry
    raise NotFoundError(f"model {name!r} is neither in {folder} nor in the Hugging Face cache")


def _scan() -> HFCacheInfo:
    import huggingface_hub  # slow to import

    return huggingface_hub.scan_cache_dir()


def _hub_entries() -> list[tuple[Entry, list[str]]]:
    """Return the repositories that hold a checkpoint, each with its revisions."""
    from huggingface_hub.errors import CacheNotFound

    try:
        scan = _scan()
    except CacheNotFound:
        return []
    found = []
    for repository in sorted(scan.repos, key=lambda repository: repository.repo_id):
        newest = max(repository.revisions, key=lambda revision: revision.last_modified, default=None)
        if repository.repo_type != "model" or newest is None or not (newest.snapshot_path / "config.json").exists():
            continue
        path = newest.snapshot_path
        entry = Entry(repository.repo_id, "hub", path, repository.size_on_disk, "", is_whole(path))
        found.append((entry, [revision.commit_hash for revision in repository.revisions]))
    return found
