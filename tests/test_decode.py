"""The loop and the text over it: what is handed to the model, when it ends, what is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvgen
from kvgen import ModelError, UsageError
from kvgen.generation.completion import Limits
from kvgen.generation.sampling import make_sampler
from kvgen.generation.text import CompletionText, StopMatcher
from tests.loop import decode
from tests.sizes import examples

GREEDY = kvgen.Sampling(temperature=0)


class Counting:
    """A model of ten tokens that answers each token with the next, and records what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], Any]] = []

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        self.calls.append((ids[0].tolist(), cache))
        logits = torch.zeros(1, 1, 10)
        logits[0, 0, (int(ids[0, -1]) + 1) % 10] = 1.0
        return logits, f"cache {len(self.calls)}"


def run(model: Any, prompt: list[int], max_tokens: int = 4, **options: Any) -> list[kvgen.Step]:
    limits = Limits(max_tokens, options.pop("eos_ids", ()), options.pop("context_length", None))
    return decode(model, torch.tensor([prompt], dtype=torch.int64), make_sampler(GREEDY), limits, **options)


def test_the_model_always_gets_the_whole_sequence_and_its_own_cache() -> None:
    model, caches = Counting(), []
    steps = run(model, [3, 4], max_tokens=3, caches=caches)
    assert model.calls == [([3, 4], None), ([3, 4, 5], "cache 1"), ([3, 4, 5, 6], "cache 2")]
    assert [step.token for step in steps] == [5, 6, 7]
    assert caches == ["cache 1", "cache 2", "cache 3"]


def test_uncached_decoding_differs_in_the_cache_alone() -> None:
    model = Counting()
    steps = run(model, [3, 4], max_tokens=3, use_cache=False)
    assert model.calls == [([3, 4], None), ([3, 4, 5], None), ([3, 4, 5, 6], None)]
    assert [(step.reused, step.computed) for step in steps] == [(0, 2), (0, 3), (0, 4)]


def test_a_cache_of_before_is_handed_in_first() -> None:
    model = Counting()
    run(model, [1], max_tokens=1, cache="earlier")
    assert model.calls == [([1], "earlier")]


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({"max_tokens": 3}, [2, 3, 4], "length"),
        ({"max_tokens": 1}, [2], "length"),
        ({"max_tokens": 9, "eos_ids": {4, 8}}, [2, 3, 4], "eos"),
        ({"max_tokens": 3, "eos_ids": {4}}, [2, 3, 4], "eos"),
        ({"max_tokens": 9, "context_length": 3}, [2, 3], "context"),
    ],
)
def test_the_loop_ends_for_the_right_reason(options: dict[str, Any], tokens: list[int], reason: str) -> None:
    steps = run(Counting(), [1], **options)
    assert [step.token for step in steps] == tokens
    assert [step.finish_reason for step in steps] == [None] * (len(tokens) - 1) + [reason]


def test_prompts_that_leave_no_room_are_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        run(Counting(), [])
    with pytest.raises(UsageError, match="5 tokens.*room for 5"):
        run(Counting(), [1] * 5, context_length=5)


def test_logits_that_are_not_numbers_stop_the_loop() -> None:
    def model(ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        return torch.full((1, 1, 4), torch.nan), None

    with pytest.raises(ModelError, match="after 2 positions"):
        run(model, [1, 2])


def test_log_probabilities_are_the_models_own() -> None:
    steps = run(Counting(), [1], max_tokens=1, top_logprobs=2)
    expected = torch.tensor([0.0] * 9 + [1.0]).log_softmax(-1)
    assert steps[0].logprob == pytest.approx(float(expected[-1]))
    assert steps[0].top_logprobs[0] == (2, pytest.approx(float(expected[-1])))
    assert len(steps[0].top_logprobs) == 2
    assert run(Counting(), [1], max_tokens=1, top_logprobs=0)[0].top_logprobs == ()
    assert run(Counting(), [1], max_tokens=1)[0].logprob is None


def test_penalties_see_the_sequence_so_far_and_know_where_the_completion_begins() -> None:
    seen: list[tuple[list[int], int]] = []

    def sampler(logits: Tensor, ids: Sequence[int], prompt_length: int) -> int:
        seen.append((list(ids), prompt_length))
        return int(logits.argmax())

    decode(Counting(), torch.tensor([[3, 4]]), sampler, Limits(3))
    assert seen == [([3, 4], 2), ([3, 4, 5], 2), ([3, 4, 5, 6], 2)]


def test_cached_and_uncached_text_are_the_same(smollm2) -> None:
    prompt = "The three states of matter are"
    options = {"max_tokens": 20}
    cached = list(kvgen.stream(smollm2, prompt, GREEDY, **options))
    uncached = list(kvgen.stream(smollm2, prompt, GREEDY, use_cache=False, **options))
    assert [chunk.step.token for chunk in cached] == [chunk.step.token for chunk in uncached]
    length = cached[0].step.positions
    assert [chunk.step.computed for chunk in cached] == [length] + [1] * 19
    assert [chunk.step.computed for chunk in uncached] == list(range(length, length + 20))


def test_a_second_prompt_reuses_what_it_shares_with_the_first(smollm2) -> None:
    france, japan = (
        kvgen.Request(smollm2.tokenizer.encode(f"The capital of {country} is"), GREEDY, max_tokens=3)
        for country in ("France", "Japan")
    )
    batch = kvgen.Batch(smollm2, batch_size=1)
    list(batch.complete(france))
    second = list(batch.complete(japan))
    assert (second[0].step.reused, second[0].step.computed) == (3, 2)
    fresh = kvgen.generate(smollm2, "The capital of Japan is", GREEDY, max_tokens=3)
    assert "".join(chunk.text for chunk in second) == fresh


def test_the_seed_decides_the_text(smollm2) -> None:
    texts = [kvgen.generate(smollm2, "I like", kvgen.Sampling(seed=seed), max_tokens=12) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_token_ids_outside_the_vocabulary_are_refused(smollm2) -> None:
    with pytest.raises(UsageError, match="49152"):
        kvgen.stream(smollm2, [1, 49152])
    with pytest.raises(UsageError, match="-1"):
        kvgen.stream(smollm2, [-1])


def test_a_stop_text_ends_the_completion_before_it(smollm2) -> None:
    chunks = list(kvgen.stream(smollm2, "Once upon a time,", GREEDY, max_tokens=30, stop=["va Ha", "metropolis"]))
    assert "".join(chunk.text for chunk in chunks) == " the city of No"
    assert chunks[-1].finish_reason == "stop"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_what_only_looked_like_a_stop_text_is_shown_in_the_end(smollm2) -> None:
    text = kvgen.generate(smollm2, "Once upon a time,", GREEDY, max_tokens=4, stop=[" Nova Heaven"])
    assert text == " the city of Nova"


def test_the_tail_that_was_held_back_comes_with_the_last_token(smollm2) -> None:
    """A completion that is cut inside a character ends with U+FFFD, as decoding all of it at once does."""
    ids = smollm2.tokenizer.encode("😀")
    steps = [kvgen.Step(id_, 1, 0, "length" if id_ == ids[-2] else None) for id_ in ids[:-1]]
    text = CompletionText(smollm2.tokenizer)
    chunks = [text.add(step) for step in steps]
    assert "".join(chunk.text for chunk in chunks) == smollm2.tokenizer.decode(ids[:-1]) != ""


pieces_lists = st.lists(st.text("abc", max_size=3), max_size=12)


@settings(max_examples=examples(1000))
@given(pieces_lists, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_texts_are_found_however_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    shown = ""
    for piece in pieces:
        shown += matcher.add(piece)
        if matcher.stopped:
            break
    else:
        shown += matcher.flush()
    whole = "".join(pieces)
    found = [whole.find(text) for text in stop if text in whole]
    assert matcher.stopped == bool(found)
    if found:
        # The stop text that is complete first ends it; one that begins earlier may not be complete yet.
        assert whole.startswith(shown)
        assert not any(text in shown for text in stop)
        assert any(whole[len(shown) :].startswith(text) for text in stop)
    else:
        assert shown == whole


def test_a_long_text_loses_its_middle_again_and_again() -> None:
    model = Counting()
    options = {"max_context": 6, "keep_first": 2}
    limits = Limits(9, (), 8, **options)
    steps = decode(model, torch.tensor([[3, 4, 5, 6, 7]]), make_sampler(GREEDY), limits)
    assert [step.token for step in steps] == [8, 9, 0, 1, 2, 3, 4, 5, 6]
    assert [ids for ids, _ in model.calls] == [
        [3, 4, 5, 6, 7],
        [3, 4, 5, 6, 7, 8],
        [3, 4, 8, 9],
        [3, 4, 8, 9, 0],
        [3, 4, 8, 9, 0, 1],
        [3, 4, 1, 2],
        [3, 4, 1, 2, 3],
        [3, 4, 1, 2, 3, 4],
        [3, 4, 4, 5],
    ]
    assert [step.positions for step in steps] == [len(ids) for ids, _ in model.calls]
    assert [step.dropped for step in steps] == [0, 0, 3, 3, 3, 6, 6, 6, 9]
    assert steps[-1].finish_reason == "length"


def test_a_prompt_longer_than_may_be_seen_loses_its_middle_at_once() -> None:
    model = Counting()
    decode(model, torch.arange(10)[None], make_sampler(GREEDY), Limits(1, (), 8, 6, 0))
    assert model.calls[0][0] == [7, 8, 9]


@pytest.mark.parametrize(("most", "keep"), [(9, 0), (6, 5), (6, -1), (1, 0)])
def test_what_may_be_seen_must_fit(most: int, keep: int) -> None:
    with pytest.raises(UsageError, match="max_context is"):
        Limits(1, (), 8, most, keep)


# --- What a caller in Python passes ------------------------------------------------------------------------------


def test_one_stop_text_is_one(smollm2: kvgen.Loaded) -> None:
    text = kvgen.generate(smollm2, "The capital of France is", GREEDY, max_tokens=12, stop="Paris")
    assert text == kvgen.generate(smollm2, "The capital of France is", GREEDY, max_tokens=12, stop=["Paris"]) == " "


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 2.5},
        {"max_tokens": "3"},
        {"max_tokens": True},
        {"max_tokens": 0},
        {"stop": 5},
        {"stop": [b"x"]},
        {"top_logprobs": -1},
        {"max_context": 1.0},
        {"keep_first": None},
        {"constraint": "[0-9]+"},
        {"sampling": {"temperature": 0}},
        {"prompt": "text"},
        {"prompt": b"text"},
        {"prompt": ["5", "17"]},
    ],
    ids=str,
)
def test_a_request_refuses_wrong_types_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is "):
        kvgen.Request(**({"prompt": (1,)} | wrong))


@pytest.mark.parametrize("function", [kvgen.generate, kvgen.score], ids=["generate", "score"])
def test_functions_refuse_wrong_types_at_once(smollm2: kvgen.Loaded, function: Any) -> None:
    with pytest.raises(UsageError, match="loaded is of type str; give what kvgen.load returns"):
        function("smollm2", "text")
    for text in (b"text", 5, ["text"], None):
        with pytest.raises(UsageError, match=f"the text is of type {type(text).__name__}"):
            function(smollm2, text)
    with pytest.raises(UsageError, match="max_tokens is 2.5"):
        kvgen.stream(smollm2, "text", max_tokens=2.5)  # before the first chunk is asked for
