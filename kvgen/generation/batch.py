"""Continuous batching: decode many completions side by side, each with the tokens that it would have alone.

Each pass computes one position for every decoding row, and the prompts of new rows. When a row ends, the next request
takes its place at once (Yu et al. 2022, Orca). Prompt prefixes shared with another row are copied from its cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

from kvgen.errors import CancelledError, KvgenError, UsageError, as_kvgen_error
from kvgen.generation.completion import Completion, Limits
from kvgen.generation.drafts import Drafter
from kvgen.generation.events import ends
from kvgen.generation.kept import KeptCaches
from kvgen.generation.loop import decode_step
from kvgen.generation.prefetch import Prefetcher
from kvgen.generation.row import RequestRow
from kvgen.generation.sampling import Sampler, make_sampler
from kvgen.generation.settings import DEFAULT_BATCH_SIZE, Request
from kvgen.generation.text import Chunk, CompletionText
from kvgen.loading.load import Loaded
from kvgen.model.causal_lm import PREFILL_CHUNK

_WORTH_WAITING = 8  # minimum shared prefix for which a row waits one pass, so that another row computes it


class Batch:
    """Completes requests side by side, or one after another from one cache.

        >>> batch, greedy = kvgen.Batch(loaded), kvgen.Sampling(temperature=0)
        >>> for text in ("The capital of France is", "The capital of Japan is"):
        ...     request = kvgen.Request(loaded.tokenizer.encode(text), greedy, max_tokens=1)
        ...     for chunk in batch.complete(request):
        ...         print(f"{chunk.text!r}: {chunk.step.reused} of {chunk.step.positions} positions reused")
        ' Paris': 0 of 5 positions reused
        ' Tokyo': 3 of 5 positions reused

    batch_size: maximum number of rows in progress; 1 for a backend that cannot batch.
    max_cache_bytes: limit for all caches together, the kept one included; None for no limit.
    use_cache: False recomputes every position on each step; a request can ask for the same.
    kept: caches of earlier completions, to continue from, the least recently used first; None counts for none.
    divide_prompts: read long prompts in parts between the passes of other rows, so that these need not wait.
    max_kept: how many caches of finished rows to keep for later requests, the least recently used go first.
    make_drafter: returns a new drafter for each row.

    Attribute `cache`: the cache of the last finished row, for the next request to continue from; None if a row took it
    over or memory ran short. Attribute `pass_began`: when the pass that produced the last chunks began, in seconds of
    `time.perf_counter`.

    Raises UsageError for drafts if the model cannot check them.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_cache_bytes: int | None = None,
        use_cache: bool = True,
        kept: Sequence[Any] = (),
        divide_prompts: bool = False,
        max_kept: int = 1,
        make_drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        if make_drafter is not None and not (use_cache and loaded.model.max_drafts(1)):
            raise UsageError("speculation needs the cache, and kvgen's own decoder without --verify-cache")
        self._kept = KeptCaches(max_kept, kept)
        self._divide_prompts = divide_prompts and loaded.model.rewinds
        self._cancelled: set[int] = set()
        self.pass_began = 0.0
        self._loaded, self._max_cache_bytes = loaded, max_cache_bytes
        self._batch_size = batch_size if loaded.model.batches else 1
        self._use_cache, self._make_drafter = use_cache, make_drafter
        self._rows: list[RequestRow] = []

    @property
    def cache(self) -> Any:
        """See `Batch`."""
        return next(reversed(self._kept.caches), None)

    @property
    def kept(self) -> list[Any]:
        """The caches of finished rows, the least recently used first."""
        return self._kept.caches

    @property
    def kept_bytes(self) -> int:
        """Memory of the caches of finished rows."""
        return self._kept.nbytes

    def cancel(self, number: int) -> None:
        """End a request of `run` before its next pass: it yields a CancelledError. Any thread may call this."""
        self._cancelled.add(number)

    def complete(self, request: Request) -> Generator[Chunk, None, None]:
        """Complete one request; yield a chunk for each token.

        Raises UsageError at once for an invalid request, and KvgenError later if a step fails.
        """
        self._abandon()
        row = self._begin(0, request, [])
        assert row is not None  # there is no other row to wait for
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
            self._abandon()

    def run(
        self, requests: Iterable[Request | KvgenError], admit: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[int, Chunk | KvgenError]]:
        """Complete requests; yield chunks as they come, each with the number of its request, from 0.

        A request that fails yields its error instead of chunks, and the others continue; an error in place of a request
        is passed through. Requests are read on a thread, as needed. An exception from reading is raised when all
        earlier rows have ended.
        admit: called before each new request. Once it returns False, the rows in progress finish and `run` returns.
        """
        with closing(self.passes(requests, admit)) as passes:
            for events in passes:
                yield from events

    def passes(
        self, requests: Iterable[Request | KvgenError], admit: Callable[[], bool] = lambda: True
    ) -> Generator[Iterable[tuple[int, Chunk | KvgenError]], None, None]:
        """Do as `run`, but yield the events of each pass together: an iterable to read to its end before the next."""
        self._abandon()
        try:
            with closing(Prefetcher(requests, self._batch_size)) as source:
                yield from self._run(source, admit)
        finally:
            self._abandon()

    def _run(
        self, source: Prefetcher[Request | KvgenError], admit: Callable[[], bool]
    ) -> Iterator[Iterable[tuple[int, Chunk | KvgenError]]]:
        failure: BaseException | None = None
        number, waiting = 0, None
        while True:
            begun: list[RequestRow] = []
            while len(self._rows) < self._batch_size and admit() and failure is None:
                if waiting is None and not source.ended:
                    try:
                        waiting = source.take(wait=not self._rows)
                    except Exception as error:  # noqa: BLE001 (raised when the earlier rows have ended)
                        failure = error
                if waiting is None:
                    break
                try:
                    row = self._begin(number, waiting, begun)
                except Exception as error:  # noqa: BLE001 (an invalid request must not stop the others)
                    yield [(number, as_kvgen_error(error))]
                else:
                    if row is None:
                        break
                    begun.append(row)
                    self._rows.append(row)
                number, waiting = number + 1, None
            yield self._drop_cancelled(number)
            if self._rows:
                yield self._pass()
            elif failure is not None:
                raise failure
            elif not admit() or (waiting is None and source.ended):
                return

    def _begin(self, number: int, request: Request | KvgenError, begun: list[RequestRow]) -> RequestRow | None:
        """Return a row for a request, or None if it has to wait. Raises UsageError for an invalid request."""
        if isinstance(request, KvgenError):
            raise request
        if number in self._cancelled:
            self._cancelled.discard(number)
            raise CancelledError("the request was cancelled")
        model, tokenizer, prompt = self._loaded.model, self._loaded.tokenizer, request.prompt
        limits = Limits(
            request.most_tokens, tokenizer.eos_ids, model.context_length, request.max_context, request.keep_first
        )
        ids = model.ids_tensor(prompt)
        limits.check_prompt(len(prompt))
        positions = request.most_positions(model.context_length)
        use_cache = self._use_cache and request.use_cache
        nbytes = model.cache_bytes(positions) if use_cache else 0
        if self._max_cache_bytes is not None and nbytes > self._max_cache_bytes:
            sizes = f"{nbytes / 1e6:.4g} MB; the limit for all caches is {self._max_cache_bytes / 1e6:.4g} MB"
            raise UsageError(f"the cache of this request may take {sizes}")
        if not self._fits(nbytes):
            return None
        donors = [row.cache for row in self._rows if row.use_cache and row not in begun]
        cache = model.cache_for(ids, positions, donors, self._kept.caches) if use_cache else None
        new = len(prompt) - getattr(cache, "length", 0)
        if use_cache and self._waits(prompt, len(prompt) - new, begun):
            return None
        if begun and sum(row.new for row in begun) + new > PREFILL_CHUNK:
            return None
        completion = Completion(
            ids,
            self._sampler(request),
            limits,
            top_logprobs=request.top_logprobs,
            drafter=self._make_drafter() if self._make_drafter and use_cache else None,
            max_drafts=model.max_drafts,
        )
        if self._kept.take(cache):
            nbytes = max(nbytes, getattr(cache, "nbytes", 0))
        while self._kept.nbytes and not self._fits(nbytes + self._kept.nbytes):
            self._kept.drop_first()
        text = CompletionText(tokenizer, request.stop)
        return RequestRow(
            completion=completion, cache=cache, use_cache=use_cache, number=number, text=text, new=new, nbytes=nbytes
        )

    def _waits(self, prompt: Sequence[int], shared: int, begun: list[RequestRow]) -> bool:
        """Whether a row that reads its prompt will have more of this one than the first `shared` tokens."""
        for row in (row for row in self._rows if row.use_cache and (row in begun or row.is_long)):
            if (common := common_prefix(row.completion.tokens, prompt)) > shared + _WORTH_WAITING:
                self._loaded.model.expect_branch(row.cache, min(common, len(prompt) - 1))
                return True
        return False

    def _sampler(self, request: Request) -> Sampler:
        sampler = make_sampler(request.sampling)
        if request.constraint is None:
            return sampler
        from kvgen.generation.constraint import constrained  # llguidance takes time to import

        return constrained(sampler, request.constraint, self._loaded.tokenizer, self._loaded.model.vocab_size)

    def _fits(self, nbytes: int) -> bool:
        """Whether a cache of `nbytes` fits beside those of the rows in progress."""
        limit = self._max_cache_bytes
        return limit is None or sum(row.nbytes for row in self._rows) + nbytes <= limit

    def _pass(self) -> Iterator[tuple[int, Chunk | KvgenError]]:
        """Run one decoding step; yield the text that it releases."""
        self.pass_began = time.perf_counter()
        rows = self._rows
        if self._divide_prompts:
            yield from self._read_on()
            rows = [row for row in self._rows if not row.is_long and not row.ended]
        for row, step in decode_step(self._loaded.model.forward_batch, rows):
            if row.ended:  # by a stop string inside a draft
                continue
            event = row.released(step)
            row.ended = ends(event)
            if row.ended and not isinstance(event, KvgenError):
                self._keep(row)
            yield row.number, event
        self._rows = [row for row in self._rows if not row.ended]

    def _read_on(self) -> Iterator[tuple[int, KvgenError]]:
        """Compute a part of the first long prompt; yield its error if it fails."""
        row = next((row for row in self._rows if row.is_long), None)
        if row is None:
            return
        end = len(row.completion.tokens) - row.new + PREFILL_CHUNK
        try:
            _, (row.cache,) = self._loaded.model.forward_batch([row.completion.next_ids()[:, :end]], [row.cache], [1])
        except KvgenError as error:
            row.ended = True
            yield row.number, error
        row.new, row.read = row.new - PREFILL_CHUNK, row.read + PREFILL_CHUNK

    def _drop_cancelled(self, begun: int) -> Iterator[tuple[int, KvgenError]]:
        """End the rows whose requests were cancelled, of the first `begun` requests; their caches are kept."""
        cancelled = {number for number in self._cancelled.copy() if number < begun}
        self._cancelled -= cancelled  # those of rows that had ended too
        for row in [row for row in self._rows if row.number in cancelled]:
            self._rows.remove(row)
            self._keep(row)
            yield row.number, CancelledError("the request was cancelled")

    def _keep(self, row: RequestRow) -> None:
        """Keep the cache of a row that ends."""
        if row.use_cache:
            self._kept.add(row.cache)

    def _abandon(self) -> None:
        """Drop the rows in progress; keep the cache of the last one."""
        for row in self._rows[-1:]:
            self._keep(row)
        self._rows = []
        self._cancelled.clear()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
