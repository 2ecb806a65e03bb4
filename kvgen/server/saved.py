"""Caches of finished requests in a folder, so that a server continues from them after a restart."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from kvgen.errors import CacheError, KvgenError
from kvgen.generation.prompt_cache import identity_of, load_prompt_cache, save_prompt_cache
from kvgen.loading.load import Loaded
from kvgen.model.cache import KVCache

_LEFT_BEHIND = ".kvgen-*"  # by a process that was killed while it wrote


class SavedCaches:
    """A folder with prompt caches of a model, a file each, written whole or not at all.

    note: takes what to tell the user. The folder may have caches of other models, which are left alone.

    Raises KvgenError if the folder cannot be used, or is in use by another server, and UsageError as
    `save_prompt_cache` does.
    """

    def __init__(self, folder: Path, loaded: Loaded, note: Callable[[str], None]) -> None:
        self._folder, self._loaded, self._note = folder, loaded, note
        self._model = identity_of(loaded)[:16]
        self._lock = FileLock(folder / ".lock")  # until this object ends
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)  # caches hold the texts of requests
            self._lock.acquire(blocking=False)
            for left in folder.glob(_LEFT_BEHIND):
                shutil.rmtree(left)
        except Timeout:
            raise KvgenError(f"--prompt-cache {folder}: another server uses this folder") from None
        except OSError as error:
            raise KvgenError(f"--prompt-cache {folder}: cannot be used ({error.strerror})") from error

    def load(self, max_bytes: int | None) -> list[KVCache]:
        """Return the caches, the least recently used first. max_bytes: of all together; None for no limit.

        Files that are damaged are left out, with a note.
        """
        caches: list[KVCache] = []
        left = max_bytes
        for path in sorted(self._files(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                cache = load_prompt_cache(path, self._loaded)
            except CacheError as error:
                self._note(str(error))
                continue
            if left is not None:
                left -= cache.nbytes
                if left < 0:
                    break
            caches.append(cache)
        return caches[::-1]

    def save(self, caches: Sequence[KVCache]) -> None:
        """Write caches, the least recently used first, and remove the files of all others of this model.

        Raises KvgenError if one cannot be written.
        """
        paths = {self._path(cache): cache for cache in caches}
        for path in set(self._files()) - paths.keys():  # first, so that the folder never has more than before or after
            path.unlink()
        now = time.time_ns()
        for index, (path, cache) in enumerate(paths.items()):
            if not path.exists():
                save_prompt_cache(path, cache, self._loaded)
            order = now + 1000 * index  # the system's own clock may give several files the same time
            os.utime(path, ns=(order, order))

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob(f"{self._model}-*.cache") if path.is_file()]

    def _path(self, cache: KVCache) -> Path:
        tokens = hashlib.sha256(cache.tokens.cpu().numpy().tobytes()).hexdigest()
        return self._folder / f"{self._model}-{tokens[:24]}.cache"
