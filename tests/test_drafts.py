"""Speculation: the same completion, token for token, from fewer passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgen
from kvgen import DraftModel, PromptLookup, UsageError
from kvgen.backends.native import NativeBackend
from kvgen.comparison.verified import VerifiedBackend
from kvgen.generation.completion import Limits
from kvgen.generation.drafts import MAX_DRAFT, AdaptiveLength
from kvgen.generation.sampling import make_sampler
from tests import program
from tests.families import make_checkpoint
from tests.loop import decode
from tests.sizes import examples


class Scripted:
    """Guesses what it is told to, right or wrong."""

    def __init__(self, drafts: Sequence[list[int]]) -> None:
        self.drafts = list(drafts)
        self.learned: list[tuple[int, int]] = []

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        return self.drafts.pop(0)[:most] if self.drafts else []

    def learn(self, drafted: int, accepted: int) -> None:
        self.learned.append((drafted, accepted))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeBackend]:
    """With windows, and with rotations that a long text takes other frequencies of, among them."""
    found = {}
    for kind in ("llama", "gemma3_text", "phi3"):
        folder = tmp_path_factory.mktemp(kind)
        make_checkpoint(kind, 1 if kind == "phi3" else 0, folder)
        model = kvgen.load(folder, tokenizer="ids", kernels="cpp").model
        assert isinstance(model, NativeBackend)
        found[kind] = model
    return found


def complete(model: NativeBackend, prompt: list[int], sampling: kvgen.Sampling, **options) -> list[kvgen.Step]:
    limits = Limits(
        options.pop("max_tokens", 60),
        options.pop("eos_ids", ()),
        model.context_length,
        options.pop("max_context", None),
    )
    return decode(model, torch.tensor([prompt]), make_sampler(sampling), limits, **options)


prompts = st.lists(st.integers(2, 95), min_size=1, max_size=30)
samplings = st.builds(kvgen.Sampling, temperature=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))


@given(
    data=st.data(),
    kind=st.sampled_from(["llama", "gemma3_text", "phi3"]),
    prompt=prompts,
    sampling=samplings,
    most=st.none() | st.integers(6, 90),
)
@settings(max_examples=examples(30))
def test_any_drafts_give_the_same_tokens(
    models, data, kind: str, prompt: list[int], sampling: kvgen.Sampling, most: int | None
) -> None:
    model = models[kind]
    plain = complete(model, prompt, sampling, max_context=most)
    tokens = [step.token for step in plain]
    script = []
    for _ in range(12):  # guesses that are right for a while
        start, right, length = data.draw(st.tuples(st.integers(0, 59), st.integers(0, 10), st.integers(0, 10)))
        script.append((tokens[start : start + right] + data.draw(st.lists(st.integers(2, 95), max_size=3)))[:length])
    steps = complete(model, prompt, sampling, drafter=Scripted(script), top_logprobs=1, max_context=most)
    assert [step.token for step in steps] == tokens
    expected = complete(model, prompt, sampling, top_logprobs=1, max_context=most)
    assert [step.top_logprobs for step in steps] == [step.top_logprobs for step in expected]
    assert [step.positions for step in steps] == [step.positions for step in expected]


@pytest.mark.parametrize("start", [38, 41, 44])
def test_drafts_end_where_a_longer_text_would_be_rotated_otherwise(models, start: int) -> None:
    model, prompt = models["phi3"], list(range(2, 2 + start))
    greedy = kvgen.Sampling(temperature=0)
    expected = complete(model, prompt, greedy, max_tokens=20, top_logprobs=1)
    drafter = Scripted([[step.token for step in expected[at : at + 10]] for at in (0, 48 - start, 49 - start)])
    steps = complete(model, prompt, greedy, max_tokens=20, top_logprobs=1, drafter=drafter)
    assert [step.top_logprobs for step in steps] == [step.top_logprobs for step in expected]
    assert max(step.drafted for step in steps) > 3


def test_right_drafts_save_passes_and_are_counted(models) -> None:
    model, prompt = models["llama"], [5, 6, 7]
    greedy = kvgen.Sampling(temperature=0)
    tokens = [step.token for step in complete(model, prompt, greedy, max_tokens=12)]
    wrong = (tokens[6] + 1) % 90
    drafter = Scripted([tokens[:4], [tokens[5], wrong], tokens[7:]])
    steps = complete(model, prompt, greedy, max_tokens=12, drafter=drafter)
    assert [step.token for step in steps] == tokens
    assert drafter.learned == [(4, 4), (2, 1)]  # the last ends with the text
    assert [step.guessed for step in steps] == [False, *[True] * 4, False, True, False, *[True] * 4]
    assert [step.drafted for step in steps if step.drafted] == [4, 2, 4]
    assert [step.computed for step in steps] == [7, 0, 0, 0, 0, 3, 0, 5, 0, 0, 0, 0]


@pytest.mark.parametrize("end", ["length", "eos"])
def test_a_completion_ends_inside_a_draft(models, end: str) -> None:
    model, greedy = models["llama"], kvgen.Sampling(temperature=0)
    tokens = [step.token for step in complete(model, [5, 6], greedy, max_tokens=20)]
    eos_ids = {tokens[8]} if end == "eos" else ()
    options = {"max_tokens": 20 if end == "eos" else 9, "eos_ids": eos_ids}
    expected = complete(model, [5, 6], greedy, **options)
    steps = complete(model, [5, 6], greedy, drafter=Scripted([tokens]), **options)
    assert [step.token for step in steps] == [step.token for step in expected]
    assert steps[-1].finish_reason == end


def test_the_context_is_not_overrun(models) -> None:
    model, greedy = models["llama"], kvgen.Sampling(temperature=0)
    prompt = [5] * (model.context_length - 4)
    steps = complete(model, prompt, greedy, drafter=Scripted([[5] * 10] * 4))
    assert len(steps) == 4
    assert steps[-1].finish_reason == "context"


def test_a_prompt_longer_than_the_context_can_be_speculated_on_once_its_middle_is_forgotten(models) -> None:
    model, greedy = models["llama"], kvgen.Sampling(temperature=0)
    prompt = [5, 6, 7, 8] * (model.context_length // 4 + 10)
    expected = complete(model, prompt, greedy, max_context=64, max_tokens=20)
    steps = complete(model, prompt, greedy, max_context=64, max_tokens=20, drafter=PromptLookup())
    assert [step.token for step in steps] == [step.token for step in expected]


def test_lookup_finds_what_followed_last() -> None:
    lookup = PromptLookup()
    text = [1, 2, 3, 4, 5, 1, 2, 3, 9, 8, 1, 2, 3]
    assert lookup.draft(text, 3) == [9, 8, 1]
    assert lookup.draft([*text, 9, 8], 1) == [1]
    assert lookup.draft([*text, 9, 8, 7], 5) == []


@given(st.lists(st.integers(0, 2), min_size=4, max_size=60), st.integers(1, 20))
def test_lookup_equals_a_search_of_the_text(tokens: list[int], step: int) -> None:
    lookup, drafts = PromptLookup(), []
    for length in range(4, len(tokens) + 1, step):
        seen = tokens[:length]
        starts = [
            end
            for n in (8, 5, 3)
            for end in range(length - 1, n - 1, -1)
            if seen[end - n : end] == seen[-n:] and length > n
        ]
        drafts = lookup.draft(seen, MAX_DRAFT)
        assert drafts == (seen[starts[0] :][:4] if starts else [])


def test_wrong_drafts_are_made_less_and_less() -> None:
    confidence = AdaptiveLength()
    made = 0
    for _ in range(200):
        length = confidence.length()
        made += length > 0
        if length:
            confidence.learn(length, 0)
    assert made <= 12
    confidence.learn(2, 2)
    assert confidence.length() == 4


def test_a_draft_model_that_is_the_model_is_always_right(models) -> None:
    model, greedy = models["llama"], kvgen.Sampling(temperature=0)
    expected = [step.token for step in complete(model, [5, 6, 7], greedy)]
    steps = complete(model, [5, 6, 7], greedy, drafter=DraftModel(model))
    assert [step.token for step in steps] == expected
    assert sum(step.drafted for step in steps) == sum(step.guessed for step in steps)
    assert sum(not step.guessed for step in steps) < 12


def test_logits_of_positions_that_are_cached_are_computed_again(models) -> None:
    model, ids = models["llama"], torch.randint(2, 96, (1, 20))
    expected = model.all_logits(ids)[:, -4:]
    _, cache = model(ids, None)
    (logits,), (cache,) = model.forward_batch([ids], [cache], [4])
    assert torch.equal(logits[None], expected)
    assert (cache.reused, cache.computed) == (16, 4)


def test_speculation_without_a_cache_or_a_judge_is_refused(smollm2) -> None:
    with pytest.raises(UsageError, match="needs the cache"):
        kvgen.stream(smollm2, [5], drafter=PromptLookup(), use_cache=False)
    unjudged = replace(smollm2, model=VerifiedBackend(smollm2.model, every=1))
    with pytest.raises(UsageError, match="without --verify-cache"):
        kvgen.stream(unjudged, [5], drafter=PromptLookup())


@pytest.mark.slow  # that drafts change no token, sampled ones included, is tested above
def test_sampled_tokens_keep_their_distribution(models) -> None:
    """Over many seeds, whatever is guessed, each token comes as often as its probability says."""
    model, prompt = models["llama"], [5, 6, 7, 8]
    logits, cache = model(torch.tensor([prompt]), None)
    first = int(logits[0, -1].argmax())
    logits, _ = model(torch.tensor([[*prompt, first]]), cache)
    probabilities = logits[0, -1].softmax(-1).double()
    counts = torch.zeros_like(probabilities)
    second = int(probabilities.argmax())
    for seed in range(4000):
        drafter = Scripted([[first, second]])
        sampling = kvgen.Sampling(temperature=1, top_p=1, seed=seed)
        steps = complete(model, prompt, sampling, max_tokens=3, drafter=drafter)
        if steps[0].token == first:
            counts[steps[1].token] += 1
    expected = probabilities * counts.sum()
    likely = expected > 5
    chi_squared = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    assert counts.sum() > 200
    assert chi_squared < int(likely.sum()) + 4 * (2 * int(likely.sum())) ** 0.5  # four standard deviations


run = partial(program.run, "generate")


@pytest.mark.slow
def test_on_the_command_line_the_text_stays_the_same(smollm2_path) -> None:
    arguments = ("-m", str(smollm2_path), "-p", "one two three four one two three four one two", "-t", "0", "-n", "30")
    plain, lookup, draft = (
        run(*arguments),
        run(*arguments, "--speculate", "lookup", "--stats"),
        run(*arguments, "--draft-model", str(smollm2_path), "--stats"),
    )
    assert plain.stdout == lookup.stdout == draft.stdout
    assert "drafts: " in lookup.stderr
    assert "drafts: " in draft.stderr


def test_a_draft_model_with_another_vocabulary_is_refused(smollm2_path, tiny_llama) -> None:
    folder, _ = tiny_llama()
    result = run("-m", str(smollm2_path), "--draft-model", str(folder), "-p", "x")
    assert result.returncode == 2
    assert "its vocabulary is not that of" in result.stderr
    assert run("-p", "x", "--draft-model", str(folder), "--speculate", "lookup").returncode == 2
    assert run("-p", "x", "--speculate", "lookup", "--no-cache").returncode == 2
