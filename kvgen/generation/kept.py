"""The caches of finished rows, for later requests to continue from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvgen.system import return_freed_memory

_WORTH_RETURNING = 64 << 20  # bytes; it takes milliseconds


class KeptCaches:
    """Up to `most` caches, the least recently used first; the first ones go when there are more.

    Attribute `nbytes`: memory of all of them. Each is measured once, when it is added.
    """

    def __init__(self, most: int, caches: Iterable[Any] = ()) -> None:
        self.nbytes, self._most, self._freed = 0, most, 0
        self._sized: list[tuple[Any, int]] = []
        for cache in caches:
            self._append(cache)

    @property
    def caches(self) -> list[Any]:
        return [cache for cache, _ in self._sized]

    def add(self, cache: Any) -> None:
        """Add a cache as the most recently used; None counts for none."""
        self._append(cache)
        while len(self._sized) > self._most:
            self.drop_first()

    def take(self, cache: Any) -> bool:
        """Remove a cache, to write to it; return whether it was here."""
        here = next((index for index, (one, _) in enumerate(self._sized) if one is cache), None)
        if here is not None:
            self.nbytes -= self._sized.pop(here)[1]
        return here is not None

    def drop_first(self) -> None:
        """Drop the least recently used one. Gaps that caches leave between others add up, so they go to the system."""
        nbytes = self._sized.pop(0)[1]
        self.nbytes, self._freed = self.nbytes - nbytes, self._freed + nbytes
        if self._freed >= _WORTH_RETURNING:
            self._freed = 0
            return_freed_memory()

    def _append(self, cache: Any) -> None:
        if cache is not None:
            self._sized.append((cache, getattr(cache, "nbytes", 0)))
            self.nbytes += self._sized[-1][1]
