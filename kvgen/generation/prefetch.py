"""Read an iterable on a background thread, so that slow input does not block decoding."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Generic, TypeVar

_TIMEOUT = 0.1  # seconds that `take` waits, so that the caller can check whether to stop

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Reads up to `size` items ahead. ended: whether all have been taken."""

    def __init__(self, items: Iterable[T], size: int) -> None:
        self.ended, self._closed = False, False
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(size)
        threading.Thread(target=self._fill, args=(items,), daemon=True).start()

    def take(self, *, wait: bool) -> T | None:
        """Return the next item; None if there is none yet, after a moment if `wait`. Raises what reading raised."""
        try:
            item, error = self._queue.get(timeout=_TIMEOUT) if wait else self._queue.get_nowait()
        except queue.Empty:
            return None
        self.ended = item is None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Stop reading: at once if the queue is full, else after the next item."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def _fill(self, items: Iterable[T]) -> None:
        failure: BaseException | None = None
        try:
            for item in items:
                self._queue.put((item, None))
                if self._closed:
                    return
        except BaseException as error:  # noqa: BLE001 (raised again by `take`)
            failure = error
        self._queue.put((None, failure))
