"""Continuous batching: many completions side by side, each as if it were alone.

Each pass computes one position of every row that is decoding, and the prompts of rows that begin. When a row ends, the
next request takes its place at once (Yu et al. 2022, Orca). What a prompt shares with another row is copied from that
row's cache, not computed again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kvgen.errors import KvgenError, UsageError, of_item
from kvgen.generation.completion import Completion, Limits, Step, check_prompt
from kvgen.generation.drafts import Drafter
from kvgen.generation.loop import Row, decode_step
from kvgen.generation.prefetch import Prefetcher
from kvgen.generation.sampling import Sampler, make_sampler
from kvgen.generation.settings import DEFAULT_BATCH_SIZE, Request
from kvgen.generation.text import Chunk, CompletionText
from kvgen.loading.load import Loaded
from kvgen.model.causal_lm import MOST_NEW

_WORTH_WAITING = 8  # positions that a row waits one pass for, so that another one computes them for it


@dataclass(eq=False, kw_only=True)
class _Row(Row):
    """A request under way.

    new: positions of its prompt to compute. nbytes: what its cache may take. ended: nothing more comes of it.
    """

    number: int
    text: CompletionText
    new: int
    nbytes: int
    ended: bool = False


class Batch:
    """Completes requests side by side.

    batch_size: the most at a time. A backend that cannot batch computes one at a time.
    max_cache_bytes: the most that all caches may take together, the kept one included; None for no bound.
    use_cache: False computes every position anew on each step. cache: of an earlier completion, to go on from.
    make_drafter: makes a new drafter for each row.

    Attribute `cache`: of the row that ended or was given up last, for the next request to go on from; None when a row
    has taken it over or it had to make room. Attribute `pass_began`: when the pass of the last chunks began, in
    seconds of `time.perf_counter`.

    Raises UsageError for drafts and a model that cannot judge them.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_cache_bytes: int | None = None,
        use_cache: bool = True,
        cache: Any = None,
        make_drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        if make_drafter is not None and not (use_cache and loaded.model.most_drafts(1)):
            raise UsageError("speculation needs the cache, and kvgen's own decoder without --verify-cache")
        self.cache = cache
        self.pass_began = 0.0
        self._loaded, self._max_cache_bytes = loaded, max_cache_bytes
        self._batch_size = batch_size if loaded.model.batches else 1
        self._use_cache, self._make_drafter = use_cache, make_drafter
        self._rows: list[_Row] = []

    def complete(self, request: Request) -> Generator[Chunk, None, None]:
        """One completion, a chunk for each token.

        Raises UsageError at once for a request that cannot be completed, and later what goes wrong on the way.
        """
        self._give_up()
        row = self._begin(0, request, [])
        assert row is not None  # nothing else is under way that it would have to wait for
        self._rows = [row]
        return self._chunks()

    def _chunks(self) -> Generator[Chunk, None, None]:
        try:
            while self._rows:
                for _, event in self._pass():
                    if isinstance(event, KvgenError):
                        raise event
                    yield event
        finally:
            self._give_up()

    def run(
        self, requests: Iterable[Request | KvgenError], admit: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[int, Chunk | KvgenError]]:
        """Chunks as they come, each with the number of its request, counted from 0.

        A request that fails gives its error in place of chunks, and the others go on; so does an error that stands in
        place of a request. Requests are read on a thread, as they are needed. What reading raises is raised when all
        rows before it have ended.
        admit: asked before another request is begun. Once it says no, rows that are under way end, and that is all.
        """
        self._give_up()
        try:
            with closing(Prefetcher(requests, most=self._batch_size)) as source:
                yield from self._run(source, admit)
        finally:
            self._give_up()

    def _run(
        self, source: Prefetcher[Request | KvgenError], admit: Callable[[], bool]
    ) -> Iterator[tuple[int, Chunk | KvgenError]]:
        failure: BaseException | None = None
        number, waiting = 0, None
        while True:
            begun: list[_Row] = []
            while len(self._rows) < self._batch_size and admit() and failure is None:
                if waiting is None and not source.ended:
                    try:
                        waiting = source.take(wait=not self._rows)
                    except Exception as error:  # noqa: BLE001 (kept until the rows before it have ended)
                        failure = error
                if waiting is None:
                    break
                try:
                    row = self._begin(number, waiting, begun)
                except Exception as error:  # noqa: BLE001 (whatever it is, it is this request's)
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
        model, prompt, limits = self._loaded.model, request.prompt, self._limits(request)
        ids = model.ids_tensor(prompt)
        check_prompt(len(prompt), limits)
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
            if any(_shared(row.completion.tokens, prompt) > shared + _WORTH_WAITING for row in begun):
                return None  # once that row is computed, this one has more to copy
        new = len(prompt) - shared
        if begun and sum(row.new for row in begun) + new > MOST_NEW:
            return None
        completion = Completion(
            ids,
            self._sampler(request),
            limits,
            top_logprobs=request.top_logprobs,
            drafter=self._make_drafter() if self._make_drafter else None,
            most_drafts=model.most_drafts,
        )
        kept = getattr(self.cache, "nbytes", 0)
        if cache is self.cache:
            self.cache, nbytes = None, max(nbytes, kept)
        elif not self._has_room(nbytes + kept):
            self.cache = None
        text = CompletionText(self._loaded.tokenizer, request.stop)
        return _Row(completion=completion, cache=cache, number=number, text=text, new=new, nbytes=nbytes)

    def _limits(self, request: Request) -> Limits:
        eos_ids, context_length = self._loaded.tokenizer.eos_ids, self._loaded.model.context_length
        return Limits(request.most_tokens, eos_ids, context_length, request.max_context, request.keep_first)

    def _sampler(self, request: Request) -> Sampler:
        sampler = make_sampler(request.sampling)
        if request.constraint is None:
            return sampler
        from kvgen.generation.constraint import constrained  # llguidance takes time to import

        return constrained(sampler, request.constraint, self._loaded.tokenizer, self._loaded.model.vocab_size)

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
        """One step of the decoding loop, and the text that it releases of each row."""
        self.pass_began = time.perf_counter()
        for row, step in decode_step(self._loaded.model.forward_batch, self._rows, use_cache=self._use_cache):
            if row.ended:  # by a stop text, inside a draft
                continue
            event = _chunk(row, step)
            row.ended = ends(event)
            if row.ended and not isinstance(event, KvgenError):
                self.cache = row.cache
            yield row.number, event
        self._rows = [row for row in self._rows if not row.ended]

    def _give_up(self) -> None:
        """End what is under way, if anything is; what has been computed of it is kept."""
        if self._use_cache and self._rows:
            self.cache = self._rows[-1].cache
        self._rows = []


def _chunk(row: _Row, step: Step | KvgenError) -> Chunk | KvgenError:
    if isinstance(step, KvgenError):
        return step
    try:
        return row.text.add(step)
    except Exception as error:  # noqa: BLE001 (a tokenizer's; the other rows go on)
        return of_item(error)


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
    """Length of the longest prefix that two prompts share."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
