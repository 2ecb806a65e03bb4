"""Continuous batching: many completions side by side, each as if it were alone.

A pass computes one position of every row that is decoding, and the prompts of those that begin. A row that ends leaves
its place to the next request at once (Yu et al. 2022, Orca). What a prompt shares with another row is copied from that
row's cache, not computed again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kvgen.errors import KvgenError, UsageError, of_item
from kvgen.generation.decode import Decoding, check_judge, check_prompt, ids_tensor
from kvgen.generation.drafts import Drafter
from kvgen.generation.settings import DEFAULT_MAX_ROWS, Request
from kvgen.generation.stream import limits, sampler_for
from kvgen.generation.text import Chunk, Texts
from kvgen.loading import Loaded
from kvgen.model.cached import MOST_NEW

_WORTH_WAITING = 8  # positions that a row waits one pass for, so that another one computes them for it
_PATIENCE = 0.1  # seconds after which a wait for input is interrupted to see whether to go on

T = TypeVar("T")


class Ahead(Generic[T]):
    """Reads an iterable on a thread, so that what comes late does not hold up what is under way.

    ended: whether there is nothing more to take.
    """

    def __init__(self, items: Iterable[T], most: int) -> None:
        """most: how many items to read ahead."""
        self.ended, self._closed = False, False
        self._read: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(most)
        threading.Thread(target=self._fill, args=(items,), daemon=True).start()

    def take(self, *, wait: bool) -> T | None:
        """The next item; None where there is none yet, and none came soon if `wait`. Raises what reading raised."""
        try:
            item, error = self._read.get(timeout=_PATIENCE) if wait else self._read.get_nowait()
        except queue.Empty:
            return None
        self.ended = item is None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Read no further. A thread that waits for items to be taken ends, one that waits for input after that."""
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
        except BaseException as error:  # noqa: BLE001 (it is raised again where items are taken)
            self._read.put((None, error))
            return
        self._read.put((None, None))


@dataclass(eq=False)
class _Row:
    """A completion that is under way. new: positions of its prompt to compute. nbytes: what its cache may take."""

    number: int
    prompt: Sequence[int]
    decoding: Decoding
    texts: Texts
    cache: Any
    new: int
    nbytes: int


class Batch:
    """Completes requests side by side.

    max_rows: the most at a time. A backend that cannot batch computes one at a time.
    max_cache_bytes: the most that caches may take together, that which is kept of a row that ended included; None for
        no bound.
    use_cache: False computes every position anew on each step. cache: of an earlier completion, to begin with.
    make_drafter: makes a new drafter for each row.

    Its attribute `cache` is that of the row that ended last, unless a row has taken it over or it had to make room;
    `pass_began` is when the pass began that the last chunks are from, by `time.perf_counter`.

    Raises UsageError for drafts and a model that cannot judge them.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        max_rows: int = DEFAULT_MAX_ROWS,
        max_cache_bytes: int | None = None,
        use_cache: bool = True,
        cache: Any = None,
        make_drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        if make_drafter is not None:
            check_judge(loaded.model, use_cache)
        self.cache = cache
        self.pass_began = 0.0
        self._loaded, self._max_cache_bytes = loaded, max_cache_bytes
        self._max_rows = max_rows if loaded.model.batches else 1
        self._use_cache, self._make_drafter = use_cache, make_drafter
        self._rows: list[_Row] = []

    def run(
        self, requests: Iterable[Request | KvgenError], admit: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[int, Chunk | KvgenError]]:
        """Chunks as they come, each with the number of its request, counted from 0.

        A request that cannot be completed gives its error in place of chunks, and the others go on; so does an error
        that stands where a request should. Requests are read as they are needed, on a thread. What reading raises is
        raised when all rows before it have ended.
        admit: asked before another request is begun. Once it says no, rows that are under way end, and that is all.
        """
        with closing(Ahead(requests, most=self._max_rows)) as source:
            yield from self._run(source, admit)

    def _run(
        self, source: Ahead[Request | KvgenError], admit: Callable[[], bool]
    ) -> Iterator[tuple[int, Chunk | KvgenError]]:
        self._rows = []  # of a run that was given up
        failure: BaseException | None = None
        number, waiting = 0, None
        while True:
            begun: list[_Row] = []
            while len(self._rows) < self._max_rows and admit() and failure is None:
                if waiting is None and not source.ended:
                    try:
                        waiting = source.take(wait=not self._rows)
                    except Exception as error:  # noqa: BLE001 (kept until the rows before it have ended)
                        failure = error
                if waiting is None:
                    break
                try:
                    row = self._begin(number, waiting, begun)
                except Exception as error:  # noqa: BLE001 (whatever it is, it is this row's: samplers meet odd settings)
                    yield number, of_item(error)
                else:
                    if row is None:
                        break
                    begun.append(row)
                    self._rows.append(row)
                number, waiting = number + 1, None
            if self._rows:
                yield from self._pass()
            elif failure is not None:
                raise failure
            elif not admit() or (waiting is None and source.ended):
                return

    def _begin(self, number: int, request: Request | KvgenError, begun: list[_Row]) -> _Row | None:
        """A row for a request, or None if it has to wait. Raises UsageError for one that cannot be completed."""
        if isinstance(request, KvgenError):
            raise request
        model, prompt, ends_at = self._loaded.model, request.prompt, limits(self._loaded, request)
        ids = ids_tensor(model, prompt)
        check_prompt(len(prompt), ends_at)
        most = request.most_positions(model.context_length)
        nbytes = model.cache_bytes(most) if self._use_cache else 0
        self._check_size(nbytes)
        if not self._has_room(nbytes):
            return None
        cache, shared = None, 0
        if self._use_cache:
            donors = [row.cache for row in self._rows if row not in begun]
            cache = model.cache_for(ids, most, donors, self.cache)
            shared = getattr(cache, "length", 0)
            if any(_shared(row.prompt, prompt) > shared + _WORTH_WAITING for row in begun):
                return None  # once that row is computed, this one has more to copy
        new = len(prompt) - shared
        if begun and sum(row.new for row in begun) + new > MOST_NEW:
            return None
        decoding = Decoding(
            ids,
            sampler_for(self._loaded, request),
            ends_at,
            top_logprobs=request.top_logprobs,
            drafter=self._make_drafter() if self._make_drafter else None,
            most_drafts=model.most_drafts,
        )
        kept = getattr(self.cache, "nbytes", 0)
        if cache is self.cache:
            self.cache, nbytes = None, max(nbytes, kept)
        elif not self._has_room(nbytes + kept):
            self.cache = None
        return _Row(number, prompt, decoding, Texts(self._loaded.tokenizer, request.stop), cache, new, nbytes)

    def _has_room(self, nbytes: int) -> bool:
        """Whether so many bytes fit beside the rows that are under way."""
        most = self._max_cache_bytes
        return most is None or sum(row.nbytes for row in self._rows) + nbytes <= most

    def _check_size(self, nbytes: int) -> None:
        """Raises UsageError for a cache that would never fit."""
        most = self._max_cache_bytes
        if most is not None and nbytes > most:
            raise UsageError(f"its cache may take {nbytes / 1e6:.0f} MB; the most for all is {most / 1e6:.0f} MB")

    def _pass(self) -> Iterator[tuple[int, Chunk | KvgenError]]:
        """One pass over all rows, and what comes of it for each."""
        self.pass_began = time.perf_counter()
        rows = self._rows
        sequences = [row.decoding.ahead() for row in rows]
        caches = [row.cache if self._use_cache else None for row in rows]
        try:
            logits, written = self._loaded.model.together(sequences, caches, [row.decoding.count for row in rows])
        except KvgenError as error:
            self._rows = []
            yield from ((row.number, error) for row in rows)
            return
        going_on = []
        for row, given, cache in zip(rows, logits, written, strict=True):
            row.cache = cache
            reused = getattr(cache, "reused", None) if self._use_cache else 0
            ended = False
            try:
                for step in row.decoding.take(given, reused):
                    chunk = row.texts.add(step)
                    ended = ends(chunk)
                    yield row.number, chunk
                    if ended:
                        break
            except Exception as error:  # noqa: BLE001 (as in `run`: the other rows are not to end with this one)
                ended = True
                yield row.number, of_item(error)
            if ended:
                self.cache = cache
            else:
                going_on.append(row)
        self._rows = going_on


def ends(event: Chunk | KvgenError) -> bool:
    """Whether nothing more comes of a request."""
    return isinstance(event, KvgenError) or event.finish_reason is not None


def in_order(events: Iterable[tuple[int, Chunk | KvgenError]]) -> Iterator[tuple[int, Chunk | KvgenError]]:
    """The events of `Batch.run`, those of each request together and in the order of requests, as soon as can be."""
    held: dict[int, list[Chunk | KvgenError]] = defaultdict(list)
    current = 0
    for number, event in events:
        held[number].append(event)
        while current in held:
            here = held.pop(current)
            for one in here:
                yield current, one
            if not ends(here[-1]):
                break
            current += 1


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two prompts begin with alike."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
