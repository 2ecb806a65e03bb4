"""Filters against transformers' own, their order, and the sampler's statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from kvgen import ModelError, Sampling, UsageError
from kvgen.generation import sampling
from tests.sizes import examples

logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60)
ids_lists = st.lists(st.integers(0, 1), min_size=1, max_size=20)
FILTERS = {
    "top_k": (sampling.top_k, reference.TopKLogitsWarper, st.integers(1, 70)),
    "top_p": (sampling.top_p, reference.TopPLogitsWarper, st.floats(0.01, 0.99)),
    "min_p": (sampling.min_p, reference.MinPLogitsWarper, st.floats(0.01, 0.99)),
    "typical_p": (sampling.typical_p, reference.TypicalLogitsWarper, st.floats(0.01, 0.99)),
    "temperature": (sampling.scale, reference.TemperatureLogitsWarper, st.floats(0.05, 5)),
}


@pytest.mark.parametrize("name", FILTERS)
@settings(max_examples=examples(200))
@given(data=st.data())
def test_filters_equal_those_of_transformers(name: str, data: st.DataObject) -> None:
    ours, theirs, values = FILTERS[name]
    logits = torch.tensor(data.draw(logits_lists))
    value = data.draw(values)
    assert torch.equal(ours(logits, value), theirs(value)(None, logits[None])[0])


@settings(max_examples=examples(200))
@given(logits_lists, st.data(), st.floats(0.1, 3))
def test_repetition_penalty_equals_that_of_transformers(values, data, penalty: float) -> None:
    logits = torch.tensor(values)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=30)))
    expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None].clone())[0]
    assert torch.equal(sampling.repetition_penalty(logits, ids, penalty), expected)


@settings(max_examples=examples(200))
@given(logits_lists, st.data())
def test_every_filter_keeps_a_token_and_changes_none_that_it_keeps(values: list[float], data: st.DataObject) -> None:
    logits = torch.tensor(values)
    for name in ("top_k", "top_p", "min_p", "typical_p"):
        ours, _, arguments = FILTERS[name]
        result = ours(logits, data.draw(arguments))
        kept = result > -torch.inf
        assert kept.any()
        assert torch.equal(result[kept], logits[kept])


@pytest.mark.parametrize(("temperature", "k", "p", "m", "t"), [(1.7, 7, 0.9, 0.12, 0.9), (2.0, 8, 0.73, 0.51, 0.45)])
def test_filters_run_in_the_order_of_transformers(temperature: float, k: int, p: float, m: float, t: float) -> None:
    """Between them the two settings tell every swap of neighbours, but for temperature and top-k: those commute."""
    scores = logits = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0])[None]
    for warper in (
        reference.TemperatureLogitsWarper(temperature),
        reference.TopKLogitsWarper(k),
        reference.TopPLogitsWarper(p),
        reference.MinPLogitsWarper(m),
        reference.TypicalLogitsWarper(t),
    ):
        scores = warper(None, scores)
    filtered = logits[0]
    for apply in sampling._filters(Sampling(temperature=temperature, top_k=k, top_p=p, min_p=m, typical_p=t)):
        filtered = apply(filtered)
    assert torch.equal(filtered, scores[0])


def draw(
    settings_: Sampling, logits: torch.Tensor, ids: list[int] = (), prompt_length: int = 0, n: int = 1
) -> list[int]:
    sampler = sampling.make_sampler(settings_)
    return [sampler(logits, list(ids), prompt_length) for _ in range(n)]


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 20_000
    counts = torch.bincount(torch.tensor(draw(Sampling(temperature=0.8, top_p=1, seed=1), logits, n=n)), minlength=4)
    expected = (logits / 0.8).softmax(-1)
    # Five standard deviations of a binomial share; a wrong temperature is off by tens of them.
    assert ((counts / n - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_the_seed_decides() -> None:
    logits = torch.zeros(1000)
    one = draw(Sampling(seed=5, top_p=1), logits, n=20)
    assert one == draw(Sampling(seed=5, top_p=1), logits, n=20)
    assert one != draw(Sampling(seed=6, top_p=1), logits, n=20)


def test_no_seed_is_a_new_one_each_time_and_leaves_torchs_own_alone() -> None:
    logits = torch.zeros(100_000)
    torch.manual_seed(0)
    one = draw(Sampling(top_p=1), logits, n=3)
    torch.manual_seed(0)
    assert one != draw(Sampling(top_p=1), logits, n=3)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_temperature_zero_is_the_most_likely_token_whatever_the_filters() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9])
    assert draw(Sampling(temperature=0, typical_p=0.1), logits, n=5) == [1] * 5


def test_presence_and_frequency_penalties_count_the_completion_alone() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    greedy = {"temperature": 0.0}
    assert draw(Sampling(presence_penalty=1.5, **greedy), logits, [0, 0, 2], prompt_length=2) == [0]
    assert draw(Sampling(presence_penalty=1.5, **greedy), logits, [2, 0], prompt_length=1) == [1]
    assert draw(Sampling(frequency_penalty=0.6, **greedy), logits, [0], prompt_length=0) == [0]
    assert draw(Sampling(frequency_penalty=0.6, **greedy), logits, [0, 0], prompt_length=0) == [1]


@pytest.mark.parametrize("temperature", [1e-40, 1e-320])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert draw(Sampling(temperature=temperature, top_p=1), torch.tensor([1.0, 3.0, 2.9]), n=5) == [1] * 5


def test_logit_bias_comes_first() -> None:
    logits = torch.tensor([1.0, 0.0, 0.0])
    assert draw(Sampling(temperature=0, logit_bias={2: 5.0}), logits) == [2]
    # Bias first makes the logit positive, and the penalty then divides it: 1 + 3 = 4, 4 / 5 < 1.
    assert draw(Sampling(temperature=0, logit_bias={2: 4.0}, repetition_penalty=5.0), logits, [2]) == [0]
    with pytest.raises(UsageError, match="vocabulary of 3"):
        draw(Sampling(logit_bias={3: 1.0}), logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-45},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {5: 1e39}},
        {"logit_bias": {99999999999999999999: 1.0}},
        {"presence_penalty": 1e39},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": "x"},
        {"seed": 1.5},
        {"temperature": "0"},
        {"temperature": None},
        {"temperature": True},
        {"top_k": 1.5},
        {"top_p": "1"},
        {"repetition_penalty": [1]},
        {"logit_bias": [5]},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {5: "1"}},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


@settings(max_examples=examples(30))
@given(st.integers(0, 2**31), st.floats(0.05, 0.99), st.floats(0.5, 8))
def test_top_p_of_a_large_vocabulary_equals_that_of_transformers(seed: int, p: float, spread: float) -> None:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * spread
    assert torch.equal(sampling.top_p(logits, p), reference.TopPLogitsWarper(p)(None, logits[None])[0])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_where_no_token_has_a_probability_none_is_drawn(value: float) -> None:
    with pytest.raises(ModelError, match="no token can be sampled"):
        sampling.draw(torch.full((3,), value), torch.Generator())


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sampling.draw(logits, generator) for _ in range(20000)]), minlength=5)
    expected = logits.softmax(-1) * 20000
    assert counts[2] == counts[4] == 0
    seen = expected > 0
    chi_squared = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    assert chi_squared < 13.8  # of 2 degrees of freedom, exceeded once in a thousand


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_range_draw_tokens_with_a_probability(number: float, monkeypatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, generator: torch.tensor([number], dtype=dtype))
    logits = torch.tensor([-torch.inf, 0.3, 0.1, -torch.inf])
    assert sampling.draw(logits, torch.Generator()) == (1 if number == 0 else 2)
