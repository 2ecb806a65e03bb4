"""Read an iterable on a thread, so that slow input does not hold up what is under way."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Generic, TypeVar

_PATIENCE = 0.1  # seconds after which a wait for input returns, so that the caller can look whether to go on

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Items of an iterable, read ahead. ended: whether all are taken."""

    def __init__(self, items: Iterable[T], most: int) -> None:
        """most: how many items to read ahead."""
        self.ended, self._closed = False, False
        self._read: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(most)
        threading.Thread(target=self._fill, args=(items,), daemon=True).start()

    def take(self, *, wait: bool) -> T | None:
        """The next item; None if there is none yet, with `wait` after a moment. Raises what reading raised."""
        try:
            item, error = self._read.get(timeout=_PATIENCE) if wait else self._read.get_nowait()
        except queue.Empty:
            return None
        self.ended = item is None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Stop reading. A thread that waits for room ends at once, one that waits for input with the next item."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._read.get_nowait()

    def _fill(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                self._read.put((item, None))
                if self._closed:
                    return
        except BaseException as error:  # noqa: BLE001 (raised again where items are taken)
            self._read.put((None, error))
            return
        self._read.put((None, None))
