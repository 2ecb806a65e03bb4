"""Many sequences side by side: each gets what it gets alone, whatever stands beside it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgen
from kvgen import Chunk, KvgenError, Sampling, UsageError
from kvgen.backends.native import NativeBackend
from kvgen.backends.python import PythonBackend
from kvgen.errors import CancelledError
from kvgen.generation.batch import Batch
from kvgen.generation.events import ends, in_order
from kvgen.generation.prefetch import Prefetcher
from kvgen.generation.settings import Request
from kvgen.loading.load import Loaded
from kvgen.model.cache import KVCache
from kvgen.model.causal_lm import CausalLM
from tests.families import make_checkpoint
from tests.sizes import examples
from tests.test_cache import MODELS, TOLERANCE, any_state

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """On the kernels: without and with windows, and with LongRoPE."""
    loaded = {}
    for kind, number in (("llama", 0), ("gemma3_text", 0), ("phi3", 1)):
        folder = tmp_path_factory.mktemp(kind)
        make_checkpoint(kind, number, folder)
        loaded[kind] = kvgen.load(folder, tokenizer="ids", kernels="cpp")
    return loaded


def tokens_of(loaded: Loaded, requests: list[Request], **options: Any) -> list[list[int] | str]:
    """What each request gives: tokens, or the error."""
    found: list[Any] = [[] for _ in requests]
    for number, event in Batch(loaded, **options).run(iter(requests)):
        if isinstance(event, KvgenError):
            found[number] = str(event)
        else:
            found[number].append(event.step.token)
    return found


def alone(loaded: Loaded, request: Request) -> list[int]:
    chunks = kvgen.stream(loaded, request.prompt, request.sampling, max_tokens=request.max_tokens, stop=request.stop)
    return [chunk.step.token for chunk in chunks]


# --- One pass over several sequences ------------------------------------------------------------------------------


@given(data=st.data(), kind=st.sampled_from(["llama", "gemma3_text", "phi3"]))
@settings(max_examples=examples(40))
def test_a_sequence_beside_others_has_the_bits_that_it_has_alone(small: dict[str, Loaded], data, kind: str) -> None:
    model = small[kind].model
    texts = data.draw(st.lists(st.lists(st.integers(2, 95), min_size=2, max_size=90), min_size=1, max_size=5))
    expected = [model.all_logits(torch.tensor([text]))[0] for text in texts]
    caches: list[Any] = [None] * len(texts)
    for _ in range(3):
        chosen = data.draw(st.sets(st.integers(0, len(texts) - 1), min_size=1))
        ends_ = [data.draw(st.integers(1, len(texts[row]))) for row in chosen]
        counts = [data.draw(st.integers(1, min(3, end))) for end in ends_]
        if kind == "phi3":
            counts = [1] * len(counts)  # logits before the last are those of a text of this length
        sequences = [torch.tensor([texts[row][:end]]) for row, end in zip(chosen, ends_, strict=True)]
        logits, written = model.forward_batch(sequences, [caches[row] for row in chosen], counts)
        for row, end, count, given_, cache in zip(chosen, ends_, counts, logits, written, strict=True):
            caches[row] = cache
            if kind != "phi3" or end == len(texts[row]) or end <= 20:
                assert torch.equal(given_, expected[row][end - count : end])


@any_state
@given(data=st.data())
def test_on_torch_sequences_side_by_side_have_their_own_logits(model: CausalLM, data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=40), min_size=1, max_size=4))
    caches: list[Any] = [None] * len(texts)
    for _ in range(3):
        lengths = [data.draw(st.integers(1, len(text))) for text in texts]
        sequences = [torch.tensor([text[:length]]) for text, length in zip(texts, lengths, strict=True)]
        logits, caches = model.forward_batch(sequences, caches, [1] * len(texts))
        for ids, found in zip(sequences, logits, strict=True):
            torch.testing.assert_close(found[0], model.forward(ids)[0][0, -1], atol=TOLERANCE, rtol=0)


def test_rows_of_a_batched_cache_go_beside_other_caches() -> None:
    model = MODELS["windows"]
    rows, single = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]]), torch.tensor([[9, 8, 7]])
    spans = [model._span(ids, model.cache_for(ids, 0, ()), 0, ids.shape[1]) for ids in (rows, single)]
    with torch.inference_mode():
        hidden = model.extend(spans)
    for ids, found in ((rows, hidden[:14]), (single, hidden[14:])):
        alone = model._span(ids, model._checked(ids, None), 0, ids.shape[1])
        torch.testing.assert_close(found.view(*ids.shape, -1), model._extend_one(alone))


@any_state
@given(data=st.data())
def test_a_branch_is_right_and_leaves_its_origin_alone(model: CausalLM, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, 49), min_size=1, max_size=40)
    first, tail = data.draw(ids), data.draw(ids)
    shared = data.draw(st.integers(0, len(first)))
    second = torch.tensor([[*first[:shared], *tail]])
    _, origin = model.forward(torch.tensor([first]))
    branch = model.cache_for(second, data.draw(st.integers(0, 100)), [origin])
    found, branch = model.forward(second, branch)
    torch.testing.assert_close(found[0, -1], model.forward(second)[0][0, -1], atol=TOLERANCE, rtol=0)
    again = torch.tensor([[*first, 5]])
    torch.testing.assert_close(model.forward(again, origin)[0], model.forward(again)[0], atol=TOLERANCE, rtol=0)


@any_state
@given(first=st.lists(st.integers(0, 49), min_size=4, max_size=30), cut=st.integers(1, 3))
def test_what_becomes_of_its_origin_does_not_reach_a_branch(model: CausalLM, first: list[int], cut: int) -> None:
    _, origin = model.forward(torch.tensor([first]))
    branch = origin.branch(len(first), 64)
    edited = torch.tensor([[*first[:-cut], *(49 - id_ for id_ in first[-cut:])]])
    model.forward(edited, origin)
    longer = torch.tensor([[*first, 3]])
    torch.testing.assert_close(model.forward(longer, branch)[0], model.forward(longer)[0], atol=TOLERANCE, rtol=0)


def test_the_donor_that_has_the_most_is_taken() -> None:
    model = MODELS["plain"]
    donors = [model.forward(torch.tensor([[1, 2, *range(10, 10 + n)]]))[1] for n in (3, 9, 6)]
    cache = model.cache_for(torch.tensor([[1, 2, *range(10, 25)]]), 64, donors)
    assert cache.length == 11


def test_only_donors_that_may_have_the_most_are_asked_how_far_they_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = MODELS["plain"], []
    donors = [model.forward(torch.tensor([[1, 2, *range(10, 10 + n)]]))[1] for n in (3, 9, 6)]
    for donor in donors:
        reach = partial(lambda donor, length: asked.append(donor) or KVCache.reach(donor, length), donor)
        monkeypatch.setattr(donor, "reach", reach, raising=False)
    assert model.cache_for(torch.tensor([[1, 2, *range(10, 25)]]), 64, donors).length == 11
    assert asked and all(one is donors[1] for one in asked)
    monkeypatch.setattr(donors[1], "reach", lambda length: 2)  # it cannot go back to where the texts part
    assert model.cache_for(torch.tensor([[1, 2, *range(10, 25)]]), 64, donors).length == 8


# --- Continuous batching ------------------------------------------------------------------------------------------

requests_of_any_kind = st.lists(
    st.builds(
        Request,
        prompt=st.lists(st.integers(2, 95), min_size=1, max_size=30),
        sampling=st.sampled_from([GREEDY, Sampling(temperature=1.0, seed=7), Sampling(repetition_penalty=1.3, seed=1)]),
        max_tokens=st.integers(1, 12),
        stop=st.sampled_from([(), ("4 ",), ("17",)]),
    ),
    min_size=1,
    max_size=8,
)


@given(requests=requests_of_any_kind, rows=st.integers(1, 5), kind=st.sampled_from(["llama", "gemma3_text", "phi3"]))
@settings(max_examples=examples(40))
def test_a_row_gets_the_tokens_that_it_gets_alone(
    small: dict[str, Loaded], requests: list[Request], rows: int, kind: str
) -> None:
    loaded = small[kind]
    assert tokens_of(loaded, requests, batch_size=rows) == [alone(loaded, request) for request in requests]


def test_rows_that_begin_alike_compute_the_beginning_once(small: dict[str, Loaded]) -> None:
    start = [*range(2, 60)]
    requests = [Request([*start, 60 + n, 70 + n], GREEDY, 2) for n in range(6)]
    computed = {}
    for number, event in Batch(small["llama"]).run(iter(requests)):
        assert not isinstance(event, KvgenError)
        computed.setdefault(number, event.step.computed)
    assert computed == {0: 60, **dict.fromkeys(range(1, 6), 2)}


def test_a_row_begins_with_what_the_last_one_left(small: dict[str, Loaded]) -> None:
    requests = [Request([*range(2, 40), 50 + n], GREEDY, 2) for n in range(3)]
    computed: dict[int, int | None] = {}
    for number, event in Batch(small["llama"], batch_size=1).run(iter(requests)):
        assert not isinstance(event, KvgenError)
        computed.setdefault(number, event.step.computed)
    assert computed == {0: 39, 1: 1, 2: 1}


def test_a_place_that_is_free_is_taken_at_once(small: dict[str, Loaded]) -> None:
    lengths, given, changed = [9, 2, 5, 1, 3], 0, threading.Condition()

    def requests() -> Iterator[Request]:
        nonlocal given
        for n, length in enumerate(lengths):
            with changed:
                given += 1
                changed.notify()
            yield Request([3, 4, 5 + n], GREEDY, length)

    batch, passes = Batch(small["llama"], batch_size=2), set()
    for number, _ in batch.run(requests()):
        passes.add(batch.pass_began)
        with changed:  # until the thread that reads is ahead again
            assert changed.wait_for(lambda row=number: given >= min(len(lengths), row + 3), 60)
    assert len(passes) in (11, 12)  # 9 steps of the first row, and beside it 2 + 5 + 1 + 3


def test_a_row_that_cannot_be_completed_stops_no_other(small: dict[str, Loaded]) -> None:
    good = Request([3, 4, 5], GREEDY, 4)
    bad = [Request([], GREEDY, 4), Request([10**6], GREEDY, 4), UsageError("said so")]
    found = tokens_of(small["llama"], [good, bad[0], bad[1], good, bad[2], good])
    assert found[0] == found[3] == found[5] == alone(small["llama"], good)
    assert found[1] == "the prompt is empty"
    assert "outside the model's vocabulary" in found[2]
    assert found[4] == "said so"


def test_caches_stay_within_their_bound(small: dict[str, Loaded]) -> None:
    loaded = small["llama"]
    each = (10 + 5) * loaded.model.position_bytes
    requests = [Request([*range(2, 12)], GREEDY, 5) for _ in range(4)] + [Request([*range(2, 90)], GREEDY, 5)]
    batch = Batch(loaded, max_cache_bytes=2 * each)
    most = 0
    for number, event in batch.run(iter(requests)):
        most = max(most, len(batch._rows))
        if number == 4:
            assert isinstance(event, UsageError) and "the limit for all caches is" in str(event)
    assert most == 2


def test_caches_take_no_more_than_was_counted(small: dict[str, Loaded]) -> None:
    random = Random(3)

    def request() -> Request:
        prompt = [random.randrange(2, 90) for _ in range(random.randrange(1, 120))]
        return Request(prompt, GREEDY, random.randrange(1, 100))

    for loaded in small.values():
        most = 2 * loaded.model.cache_bytes(220)
        batch, largest = Batch(loaded, max_cache_bytes=most), 0
        for _, event in batch.run(request() for _ in range(30)):
            assert not isinstance(event, KvgenError)
            caches = {id(cache): cache for cache in [batch.cache, *(row.cache for row in batch._rows)] if cache}
            largest = max(largest, sum(cache.nbytes for cache in caches.values()))
        assert most / 2 < largest <= most


def test_a_cache_that_nobody_uses_is_taken_over_not_copied(small: dict[str, Loaded]) -> None:
    loaded, text = small["llama"], [*range(2, 60)]
    _, cache = loaded.model(torch.tensor([text]), None)
    batch = Batch(loaded, kept=[cache])
    events = batch.run([Request([*text, 70, 71], GREEDY, 5)])
    first = next(events)[1]
    assert isinstance(first, Chunk)
    assert (first.step.reused, batch._rows[0].cache, batch.cache) == (58, cache, None)
    _, other = loaded.model(torch.tensor([text]), None)
    batch = Batch(loaded, kept=[other])
    events = batch.run([Request([2, 3, 4, 70], GREEDY, 5)])
    first = next(events)[1]
    assert isinstance(first, Chunk)
    assert (first.step.reused, batch.cache, other.length) == (3, other, 58)  # most of it would be lost


def test_what_reading_raises_is_raised_after_the_rows_before_it(small: dict[str, Loaded]) -> None:
    def requests() -> Iterator[Request]:
        yield Request([3, 4], GREEDY, 5)
        raise UsageError("line 2 is bad")

    found = []
    with pytest.raises(UsageError, match="line 2 is bad"):
        for _, event in Batch(small["llama"]).run(requests()):
            found.append(event)
    assert len(found) == 5


def test_a_slow_source_holds_up_nothing(small: dict[str, Loaded]) -> None:
    """The second request comes only once the first has ended."""
    first_ended = threading.Event()

    def requests() -> Iterator[Request]:
        yield Request([3, 4], GREEDY, 5)
        assert first_ended.wait(60)
        yield Request([5, 6], GREEDY, 2)

    numbers = []
    for number, event in Batch(small["llama"]).run(requests()):
        numbers.append(number)
        if ends(event):
            first_ended.set()
    assert numbers == [0] * 5 + [1] * 2


def test_once_no_more_are_admitted_those_under_way_end(small: dict[str, Loaded]) -> None:
    requests = [Request([3, 4, n], GREEDY, 6) for n in range(2, 30)]
    seen: list[int] = []
    batch = Batch(small["llama"], batch_size=3)
    for number, _ in batch.run(iter(requests), admit=lambda: len(seen) < 5):
        seen.append(number)
    assert 1 <= len(set(seen)) <= 6
    assert all(seen.count(number) == 6 for number in set(seen))


def test_drafts_change_no_row(small: dict[str, Loaded]) -> None:
    loaded = small["llama"]
    requests = [Request([*range(2, 12), *range(2, 9), n], GREEDY, 20) for n in range(3)]
    plain = tokens_of(loaded, requests)
    assert tokens_of(loaded, requests, make_drafter=kvgen.PromptLookup) == plain
    assert tokens_of(loaded, requests, use_cache=False) == plain


def test_a_backend_that_cannot_batch_completes_one_row_at_a_time(tiny_llama) -> None:
    from tests.test_compare import SmallDecoder

    backend = PythonBackend(SmallDecoder())
    loaded = Loaded(backend, kvgen.load(tiny_llama()[0], tokenizer="ids").tokenizer, "small")
    requests = [Request([3, 4, n], GREEDY, 4) for n in range(5, 8)]
    assert tokens_of(loaded, requests) == [alone(loaded, request) for request in requests]


class _Concatenated:
    """A cache that a model makes anew in each pass."""


def test_no_cache_outlives_the_next_pass(tiny_llama) -> None:
    living: weakref.WeakSet[_Concatenated] = weakref.WeakSet()

    def model(ids: torch.Tensor, cache: Any = None, /) -> tuple[torch.Tensor, _Concatenated]:
        living.add(new := _Concatenated())
        return torch.zeros(1, 1, 8), new

    loaded = Loaded(PythonBackend(model), kvgen.load(tiny_llama()[0], tokenizer="ids").tokenizer, "concatenating")
    batch = Batch(loaded)
    chunks = [event for _, event in batch.run([Request([3, 4], GREEDY, 20)])]
    assert (len(chunks), len(living)) == (20, 1)
    del batch
    chunks += kvgen.stream(loaded, [3, 4], GREEDY, max_tokens=20)
    assert (len(chunks), len(living)) == (40, 0)


def test_in_order_puts_rows_together_and_lets_the_first_through_at_once() -> None:
    more, last = SimpleNamespace(finish_reason=None), SimpleNamespace(finish_reason="eos")
    error = UsageError(".")
    read: list[int] = []

    def events() -> Iterator[tuple[int, Any]]:
        for event in [(1, more), (0, more), (1, last), (2, error), (0, last), (3, last)]:
            read.append(event[0])
            yield event

    found = in_order(events())
    assert next(found) == (0, more)
    assert read == [1, 0]
    assert list(found) == [(0, last), (1, more), (1, last), (2, error), (3, last)]


def test_reading_ahead_ends_and_raises() -> None:
    ahead = Prefetcher(iter([1, 2]), size=1)
    taken = []
    while not ahead.ended:
        taken.append(ahead.take(wait=True))
    assert [item for item in taken if item is not None] == [1, 2]


@pytest.mark.parametrize("most", [1, 3])
def test_reading_ends_with_the_run_that_it_was_for(small: dict[str, Loaded], most: int) -> None:
    before = set(threading.enumerate())
    requests = (Request([3, 4], GREEDY, 3) for _ in range(10**9))
    run = Batch(small["llama"], batch_size=most).run(requests)
    next(run)
    (reader,) = set(threading.enumerate()) - before
    run.close()
    reader.join(60)
    assert not reader.is_alive()


def test_the_batched_pattern_is_equivalent_on_the_default_model(smollm2: Loaded) -> None:
    from kvgen.comparison.comparison import compare_ids

    assert isinstance(smollm2.model, NativeBackend)
    prompt = smollm2.tokenizer.encode("Once upon a time,")
    result = compare_ids(smollm2.model, prompt, patterns=["batched"], steps=12)
    assert result.acceptable
    assert result.rows[1].verdict == "equivalent"


@pytest.mark.slow
def test_a_thousand_rows_are_those_of_single_runs(smollm2: Loaded) -> None:
    prompts = (f"The {n} of {n % 7} {'small ' * (n % 5)}stories begins" for n in range(1000))
    requests = [Request(smollm2.tokenizer.encode(prompt), GREEDY, 16) for prompt in prompts]
    assert tokens_of(smollm2, requests) == [alone(smollm2, request) for request in requests]


def test_a_completion_that_is_given_up_leaves_its_cache(small: dict[str, Loaded]) -> None:
    """So that a chat goes on from an answer that was interrupted, whatever kind of cache the model has."""
    batch = Batch(small["llama"], batch_size=1)
    chunks = batch.complete(Request([5, 6, 7], GREEDY, 20))
    told = [next(chunks).step.token for _ in range(4)]
    chunks.close()
    assert batch.cache.tokens[0].tolist() == [5, 6, 7, *told[:3]]
    again = next(batch.complete(Request([5, 6, 7, *told, 9], GREEDY, 20)))
    assert (again.step.reused, again.step.computed) == (6, 2)


def test_a_run_that_is_interrupted_in_a_pass_leaves_its_cache(
    small: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(small["llama"])
    events = batch.run([Request([5, 6, 7], GREEDY, 20)])
    next(events)

    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(small["llama"].model, "forward_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert batch.cache.tokens[0].tolist() == [5, 6, 7]


def test_the_events_of_a_pass_come_together(small: dict[str, Loaded]) -> None:
    batch, came = Batch(small["llama"]), dict[float, list[int]]()
    for events in batch.passes(Request([3, 4, 5 + n], GREEDY, 9) for n in range(3)):
        if numbers := [number for number, _ in events]:
            assert batch.pass_began not in came
            came[batch.pass_began] = numbers
    assert sorted(number for numbers in came.values() for number in numbers) == [0] * 9 + [1] * 9 + [2] * 9
    assert all(len(set(numbers)) == len(numbers) for numbers in came.values())


# --- Caches of finished rows, and rows that are cancelled ----------------------------------------------------------


def test_several_caches_are_kept_and_the_least_recently_used_goes_first(small: dict[str, Loaded]) -> None:
    loaded = small["llama"]
    texts = [[start, *range(2, 50)] for start in (60, 61, 62)]
    batch = Batch(loaded, batch_size=1, max_kept=2)
    first_reused = []
    for text in (texts[0], texts[1], texts[0], texts[2], texts[0], texts[1]):
        chunks = list(batch.complete(Request(text, GREEDY, 2)))
        assert [chunk.step.token for chunk in chunks] == alone(loaded, Request(text, GREEDY, 2))
        first_reused.append(chunks[0].step.reused)
    assert first_reused == [0, 0, 48, 0, 48, 0]


def test_kept_caches_count_against_the_bound(small: dict[str, Loaded]) -> None:
    loaded = small["llama"]
    most = 3 * loaded.model.cache_bytes(70)
    batch = Batch(loaded, max_cache_bytes=most, max_kept=100)
    for start in range(30):
        for _ in batch.complete(Request([start + 2, *range(2, 50)], GREEDY, 2)):
            caches = {id(cache): cache for cache in [*batch.kept, *(row.cache for row in batch._rows)]}
            assert sum(cache.nbytes for cache in caches.values()) <= most
            assert batch.kept_bytes == sum(cache.nbytes for cache in batch.kept)
    assert 0 < batch.kept_bytes <= most


def test_a_cancelled_row_ends_and_the_others_do_not_notice(small: dict[str, Loaded]) -> None:
    loaded = small["llama"]
    requests = [Request([3, 4, start], GREEDY, 9) for start in range(5, 9)]
    batch, found = Batch(loaded), [[] for _ in requests]
    for number, event in batch.run(iter(requests)):
        found[number].append(event)
        if number == 3 and len(found[3]) == 3:
            batch.cancel(1)
    assert isinstance(found[1].pop(), CancelledError)
    assert len(found[1]) == 3
    for number in (0, 2, 3):
        assert [event.step.token for event in found[number]] == alone(loaded, requests[number])


def test_a_request_cancelled_before_it_began_is_not_computed(small: dict[str, Loaded]) -> None:
    batch = Batch(small["llama"], batch_size=1)
    events = batch.run([Request([3, 4], GREEDY, 3), Request([5, 6], GREEDY, 3)])
    numbers = [next(events)[0]]
    batch.cancel(1)
    rest = list(events)
    assert [*numbers, *(number for number, _ in rest)] == [0, 0, 0, 1]
    assert isinstance(rest[-1][1], CancelledError)


def test_a_row_without_cache_beside_rows_with_one(small: dict[str, Loaded]) -> None:
    loaded, text = small["llama"], [*range(2, 30)]
    requests = [Request(text, GREEDY, 4), Request(text, GREEDY, 4, use_cache=False), Request(text, GREEDY, 4)]
    reused: list[list[int | None]] = [[] for _ in requests]
    for number, event in Batch(loaded).run(iter(requests)):
        assert isinstance(event, Chunk)
        reused[number].append(event.step.reused)
    assert reused == [[0, 28, 29, 30], [0, 0, 0, 0], [27, 28, 29, 30]]


# --- Long prompts in parts -------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 32 positions, for contexts of 256."""
    for module in ("batch", "row"):
        monkeypatch.setattr(f"kvgen.generation.{module}.PREFILL_CHUNK", 32)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi3"])
def test_rows_do_not_wait_for_a_long_prompt(small: dict[str, Loaded], kind: str) -> None:
    loaded = small[kind]
    long = [2 + number * 7 % 80 for number in range(180)]
    requests = [Request([3, 4], GREEDY, 20), Request(long, GREEDY, 3), Request([*long[:100], 5], GREEDY, 3)]
    found: list[list[int]] = [[] for _ in requests]
    reused: list[int | None] = [None] * 3
    before: list[int] = []
    for number, event in Batch(loaded, divide_prompts=True).run(iter(requests)):
        assert isinstance(event, Chunk)
        reused[number] = event.step.reused if not found[number] else reused[number]
        found[number].append(event.step.token)
        if number == 1:
            before.append(len(found[0]))
    assert found == [alone(loaded, request) for request in requests]
    assert before[0] >= 2  # the first row went on while the prompt was read
    assert reused[:2] == [0, 0]
    assert reused[2]  # it waited for the part that both have


@pytest.mark.usefixtures("parts")
def test_a_long_prompt_that_is_cancelled_or_fails_ends(
    small: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, long = small["llama"], [2 + number % 80 for number in range(180)]
    batch = Batch(loaded, divide_prompts=True)
    events = batch.run([Request([3, 4], GREEDY, 4), Request(long, GREEDY, 3)])
    assert next(events)[0] == 0
    batch.cancel(1)
    rest = list(events)
    assert [number for number, event in rest if isinstance(event, CancelledError)] == [1]
    forward = loaded.model.forward_batch

    def fail(sequences: Any, *others: Any) -> Any:
        if sequences[0].shape[1] > 50:
            raise KvgenError("out of memory")
        return forward(sequences, *others)

    monkeypatch.setattr(loaded.model, "forward_batch", fail)
    events = Batch(loaded, divide_prompts=True).run([Request(long, GREEDY, 3), Request([3, 4], GREEDY, 4)])
    found = [(number, str(event) if isinstance(event, KvgenError) else "") for number, event in events]
    assert (0, "out of memory") in found
    assert [number for number, _ in found].count(1) == 4
