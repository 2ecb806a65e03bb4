"""`compare` on correct models, on seeded faults, and on kvgen's own decoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

import kvgen
from kvgen import CacheError, ModelError, UsageError
from kvgen.backends.native import NativeBackend
from kvgen.backends.python import PythonBackend
from kvgen.comparison.comparison import Comparison, PatternResult, compare_ids
from kvgen.comparison.patterns import PATTERNS
from kvgen.comparison.reference import Reference
from kvgen.comparison.report import as_data
from kvgen.comparison.subjects import subject_of
from kvgen.comparison.subjects.native import NativeSubject
from kvgen.comparison.verdict import Verdict
from kvgen.comparison.verified import VerifiedBackend
from kvgen.model.config import Layer
from kvgen.model.ffns import MLP
from kvgen.model.mixers import Attention
from tests.faults import FAULTS, SmallDecoder
from tests.native_faults import FAULTS as NATIVE_FAULTS
from tests.native_faults import SPECIAL, Faulty
from tests.sizes import first
from tests.test_cache import CONFIG, CONFIGS, ROTARY, make_decoder

PROMPT = torch.randint(0, 50, (12,), generator=torch.Generator().manual_seed(7)).tolist()
SHAPES = [
    {"layers": 3, "heads": 4, "kv_heads": 2, "seed": 0},
    {"layers": 2, "heads": 4, "kv_heads": 4, "seed": 1},
    {"layers": 4, "heads": 6, "kv_heads": 2, "seed": 2},
]


def run(model: Any, *patterns: str, steps: int = 24, **options: Any) -> Comparison:
    backend = model if isinstance(model, (NativeBackend, VerifiedBackend)) else PythonBackend(model)
    return compare_ids(backend, PROMPT, patterns=patterns or ("full-sequence",), steps=steps, **options)


def names(row: PatternResult) -> set[str]:
    return {finding.name for finding in row.findings}


def one_of_each_finding(faults: Mapping[str, set[str]], known: Collection[str] = ()) -> Iterator[Any]:
    """The faults for `pytest.mark.parametrize`: only where slow tests run, those found as others are, or `known`."""
    seen: set[str] = set()
    for fault, findings in faults.items():
        yield pytest.param(fault, marks=pytest.mark.slow if fault in known or findings <= seen else ())
        if fault not in known:
            seen |= findings


# --- No false alarms, no fault missed ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", first(1, range(25)))
def test_correct_models_raise_no_alarm(seed: int, dtype: torch.dtype) -> None:
    shape = {"layers": 1 + seed % 4, "heads": 4 + 2 * (seed % 2), "kv_heads": 1 + seed % 2, "seed": seed}
    for model in (SmallDecoder(**shape).to(dtype), NativeBackend(make_decoder(seed=seed).to(dtype))):
        comparison = run(model)
        row = comparison.rows[1]
        assert row.verdict is Verdict.EQUIVALENT
        assert row.findings == ()
        assert row.tokens_verdict in (Verdict.EQUIVALENT, Verdict.NEAR_TIE)
        assert comparison.acceptable
        assert row.ratio is not None and row.ratio < 3  # half of the limit: there is room
        assert all(probe.ratio is None or probe.ratio < 3 for probe in row.probes)


# Of those that decode alike, one; `tests/test_cache.py` holds each to its uncached logits.
FAST = {
    torch.float32: ("windows", "mamba-2", "delta-nets", "short-convolutions-alone", "streams"),
    torch.bfloat16: ("plain",),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if name in fast else pytest.mark.slow)
        for dtype, fast in FAST.items()
        for name in CONFIGS
    ],
    ids=str,
)
def test_every_mechanism_is_equivalent_and_only_positions_make_the_wrong_pattern_wrong(
    name: str, dtype: torch.dtype
) -> None:
    model = NativeBackend(make_decoder(CONFIGS[name]).to(dtype))
    right, wrong = run(model, "full-sequence", "last-token").rows[1:]
    assert right.verdict is Verdict.EQUIVALENT
    config = model.decoder.config
    if config.rotaries or config.learned_positions:
        assert wrong.verdict is Verdict.DIFFERENT
        assert names(wrong) & {"offset lost", "order lost"}
    else:  # a recurrent state has no positions to lose
        assert wrong.verdict is Verdict.EQUIVALENT
        assert names(wrong) == {"harmless here"}
        assert "counts them from what is cached" in wrong.findings[0].text  # as transformers and llama.cpp do


@pytest.mark.parametrize("shape", first(1, SHAPES), ids=lambda shape: f"{shape['layers']} layers")
@pytest.mark.parametrize("fault", one_of_each_finding(FAULTS))
def test_every_fault_is_caught(fault: str, shape: dict[str, int]) -> None:
    comparison = run(SmallDecoder(fault, **shape))
    row = comparison.rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert not comparison.acceptable
    assert names(row)
    assert names(row) <= FAULTS[fault] | {"unexplained"}  # named rightly, or not at all


class Changed:
    """A model whose logits a function changes: change(logits, ids, number of cached calls so far, or 0 if uncached)."""

    rewinds = True

    def __init__(self, change: Any, fault: str | None = None, **attributes: Any) -> None:
        self.decoder, self.change, self.cached_calls = SmallDecoder(fault), change, 0
        vars(self).update(attributes)

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        logits, new_cache = self.decoder(ids, cache)
        self.cached_calls += cache is not None
        return self.change(logits, ids, 0 if cache is None else self.cached_calls), new_cache


@pytest.mark.parametrize("mask", first(1, [-1e9, torch.finfo(torch.float32).min]))
def test_a_mask_in_the_vocabulary_hides_no_fault(mask: float) -> None:
    def masked(logits: Tensor, ids: Tensor, call: int) -> Tensor:
        return torch.cat((logits[..., :-4], torch.full_like(logits[..., -4:], mask)), dim=-1)

    assert run(Changed(masked)).rows[1].verdict is Verdict.EQUIVALENT
    assert run(Changed(masked, "positions restart at 0")).rows[1].verdict is Verdict.DIFFERENT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_of_16_bits_from_a_model_of_32_raise_no_alarm(dtype: torch.dtype) -> None:
    assert run(Changed(lambda logits, ids, call: logits.to(dtype))).rows[1].verdict is Verdict.EQUIVALENT


def test_rows_with_equal_last_tokens_are_tested() -> None:
    def mixed(logits: Tensor, ids: Tensor, call: int) -> Tensor:
        same = (ids[:, -1] == ids[0, -1]) & (call > 0)
        return torch.where(same[:, None, None], logits[:1], logits)

    assert names(run(Changed(mixed)).rows[1]) == {"rows mixed"}


def test_a_constant_shift_is_named() -> None:
    row = run(Changed(lambda logits, ids, call: logits + (call > 0))).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert names(row) == {"constant shift"}


NOISE = torch.randn(61, generator=torch.Generator().manual_seed(1))
CHANGES = {
    "a scale": lambda logits: logits * 1.001,
    "a temperature": lambda logits: logits / 1.02,
    "a soft cap": lambda logits: 50 * torch.tanh(logits / 50),
    "one noise for all steps": lambda logits: logits + 0.002 * NOISE,
    "a bias": lambda logits: logits + 0.002 * NOISE.abs(),
}


@pytest.mark.parametrize("change", first(2, CHANGES))
def test_an_even_change_of_the_logits_is_not_called_rounding(change: str) -> None:
    row = run(Changed(lambda logits, ids, call: CHANGES[change](logits) if call else logits)).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert names(row) == {"unexplained"}


class Scaled(SmallDecoder):
    """Cached values are a little too small, without losing bits."""

    def join(self, layer: int, k: Tensor, v: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        scaled = cache and replace(cache, values=tuple(values * 0.999 for values in cache.values))
        return super().join(layer, k, v, scaled)


def test_values_with_a_scale_are_not_called_rounding() -> None:
    row = run(Scaled()).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert names(row) == {"unexplained"}


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_changed_logits_are_named(count: int) -> None:
    def changed(logits: Tensor, ids: Tensor, call: int) -> Tensor:
        return torch.cat((logits[..., :count] + 0.1, logits[..., count:]), dim=-1) if call else logits

    row = run(Changed(changed)).rows[1]
    assert names(row) == {"few logits"}
    assert f"Only {count} logit" in row.findings[0].text


def flipped(where: Callable[[Tensor], bool]) -> Changed:
    """A model whose cached calls are wrong on some texts, (B, n)."""
    return Changed(lambda logits, ids, call: logits.flip(-1) if call and where(ids) else logits)


def test_one_wrong_length_is_not_called_a_limit() -> None:
    assert "beyond a length" not in names(run(flipped(lambda ids: ids.shape[1] == 20)).rows[1])
    assert names(run(flipped(lambda ids: ids.shape[1] >= 20)).rows[1]) == {"beyond a length"}


def test_a_wrong_token_is_not_called_a_length() -> None:
    text = run(SmallDecoder()).ids
    other = next(id_ for id_ in range(61) if id_ not in text)
    assert names(run(flipped(lambda ids: bool((ids[:, :-1] == other).any()))).rows[1]) == {"some tokens"}
    late = max(dict.fromkeys(text), key=text.index)
    assert text.index(late) > 5
    assert "beyond a length" not in names(run(flipped(lambda ids: bool((ids[:, :-1] == late).any()))).rows[1])


@pytest.mark.parametrize("equal", [lambda ids: ids[:, 1:] == ids[:, :-1], lambda ids: ids[:, 1:8] == ids[:, :1]])
def test_tokens_of_an_edited_text_or_a_row_are_not_called_edits_or_rows(equal: Callable[[Tensor], Tensor]) -> None:
    def flip(logits: Tensor, ids: Tensor, call: int) -> Tensor:
        return torch.where(equal(ids).any(1)[:, None, None], logits.flip(-1), logits) if call else logits

    prompt = [3, 17, 42, 5, 30, 11, 26, 9, 51, 3]
    row = compare_ids(PythonBackend(Changed(flip)), prompt, steps=24, continuation=list(range(20, 44))).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert names(row) == {"some tokens"}


def test_the_last_position_of_a_context_is_not_blamed_on_tokens() -> None:
    def late(logits: Tensor, ids: Tensor, call: int) -> Tensor:
        return logits.flip(-1) if call and ids.shape[1] == 36 else logits

    row = run(Changed(late, context_length=36)).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert names(row) == {"longer texts"}


def test_what_a_wider_dtype_shows_is_explained_there() -> None:
    class Slightly(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            return (logits if cache is None else logits * (1 + 4e-6)), new

    row = run(Slightly()).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert row.ratio is not None and 3 < row.ratio < 6
    assert "vanishes" not in row.findings[0].evidence


@pytest.mark.parametrize(("fault", "verdict"), [(None, Verdict.EQUIVALENT), ("window of 8", Verdict.DIFFERENT)])
def test_a_model_that_computes_longer_texts_otherwise_is_held_against_texts_of_each_length(
    fault: str | None, verdict: Verdict
) -> None:
    class Dynamic(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            return logits.roll(ids.shape[1] // 16, -1), new

    assert run(Dynamic(fault)).rows[1].verdict is verdict


def test_huge_logits_are_compared() -> None:
    assert run(Changed(lambda logits, ids, call: logits * 1e30)).rows[1].verdict is Verdict.EQUIVALENT
    assert run(Changed(lambda logits, ids, call: logits * 1e30, "window of 8")).rows[1].verdict is Verdict.DIFFERENT


class Careless(SmallDecoder):
    """Takes texts for known that are not: a beginning of the last one, or one with the same tokens in another order."""

    def __init__(self, takes: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.takes = takes

    def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
        if cache is not None and self.takes(cache[0], ids):
            return cache[1][:, -1:], cache
        logits, inner = super().forward(ids, cache and cache[2], positions)
        return logits, (ids, logits, inner)


@pytest.mark.parametrize(
    ("takes", "finding"),
    [
        (lambda old, ids: old.shape[1] > ids.shape[1] and torch.equal(old[:, : ids.shape[1]], ids), "rewinds"),
        (lambda old, ids: not torch.equal(old, ids) and torch.equal(old.sort().values, ids.sort().values), "edits"),
    ],
)
def test_beginnings_and_swapped_tokens_are_tried(takes: Callable[[Tensor, Tensor], bool], finding: str) -> None:
    row = run(Careless(takes)).rows[1]
    assert {probe.name for probe in row.probes if probe.wrong} == {finding}
    assert names(row) == {"edits not noticed"}


def test_uses_of_a_wrong_pattern_tell_no_cause_of_their_own() -> None:
    row = run(SmallDecoder("offset one too far")).rows[1]
    assert {probe.finding[0] for probe in row.probes if probe.wrong} == {"differs too"}


def test_a_fault_that_does_not_repeat_is_not_blamed_on_the_use_it_hit() -> None:
    hit = run(Changed(lambda logits, ids, call: logits.flip(-1) if call == 75 else logits)).rows[1]
    assert hit.verdict is Verdict.DIFFERENT
    assert names(hit) == {"not deterministic"}


def test_a_model_may_write_into_its_input() -> None:
    def zeroed(logits: Tensor, ids: Tensor, call: int) -> Tensor:
        ids.zero_()
        return logits

    comparison = run(Changed(zeroed))
    assert comparison.acceptable
    assert comparison.ids[: len(PROMPT)] == tuple(PROMPT)


def test_a_model_that_exits_is_not_right() -> None:
    def leave(logits: Tensor, ids: Tensor, call: int) -> Tensor:
        if call:
            raise SystemExit(0)
        return logits

    assert run(Changed(leave)).rows[1].verdict is Verdict.UNSUPPORTED


def test_a_model_that_fails_once_is_not_right() -> None:
    calls = count()

    def fail(logits: Tensor, ids: Tensor, call: int) -> Tensor:
        if next(calls) == 9:
            raise ValueError("the tenth call")
        return logits

    row = run(Changed(fail)).rows[1]
    assert row.verdict is Verdict.UNSUPPORTED
    assert row.reason.startswith("fails at times: the model failed with ValueError: the tenth call")


def test_weights_without_values_are_an_error() -> None:
    with pytest.raises(ModelError, match="on the device meta"):
        PythonBackend(SmallDecoder().to("meta"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("changes_at", "sixteen"), ("changes_at", [0]), ("context_length", "many"), ("lossy", True), ("vocab_size", 1.5)],
)
def test_wrong_attributes_of_a_model_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"the model's attribute {name} is"):
        run(Changed(lambda logits, ids, call: logits, **{name: value}))


def test_logits_of_two_sizes_are_an_error() -> None:
    row = run(Changed(lambda logits, ids, call: logits[..., :-1] if call else logits)).rows[1]
    assert row.verdict is Verdict.UNSUPPORTED
    assert "returned logits for" in row.reason


def test_values_are_not_blamed_where_positions_are_part_of_them() -> None:
    decoder = make_decoder(CONFIGS["learned-positions"])

    def restarting(ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        return decoder.append(ids if cache is None else ids[:, -1:], cache, start=0)

    row = run(restarting).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert names(row) == {"unexplained"}
    assert "the model does not accept any" in row.findings[0].evidence


@pytest.mark.slow
def test_most_faults_are_named() -> None:
    named = [fault for fault in FAULTS if names(run(SmallDecoder(fault)).rows[1]) <= FAULTS[fault]]
    assert len(named) >= 25
    assert len([fault for fault in named if "lookup wrong" not in FAULTS[fault]]) >= 18  # more than a class of causes


TINY = [
    make_decoder(),
    make_decoder(replace(CONFIG, layers=(Layer(Attention(4, 4, 8, ROTARY), MLP(32)),) * 2, dim=32), seed=1),
    make_decoder(replace(CONFIG, layers=(Layer(Attention(8, 2, 4, ROTARY), MLP(32)),) * 4), seed=2),
]


def run_native(decoder: Any, fault: str | None, prompt: list[int] = PROMPT, special: int = SPECIAL) -> PatternResult:
    model = PythonBackend(Faulty(decoder, fault, special))
    return compare_ids(model, prompt, steps=24, special_ids=frozenset({special})).rows[1]


@pytest.mark.parametrize("number", first(1, range(3)))
@pytest.mark.parametrize("fault", one_of_each_finding(NATIVE_FAULTS, known=FAULTS))
def test_faults_that_short_texts_do_not_show_are_caught(fault: str, number: int) -> None:
    row = run_native(TINY[number], fault)
    assert row.verdict is Verdict.DIFFERENT
    assert names(row)
    assert names(row) <= NATIVE_FAULTS[fault] | {"unexplained"}


def test_a_copy_in_a_wider_dtype_can_be_widened_again() -> None:
    decoder = make_decoder().bfloat16()
    expected = NativeSubject(NativeBackend(make_decoder().bfloat16().double()))(torch.tensor([PROMPT]), None)[0]
    wide = NativeSubject(NativeBackend(decoder)).in_dtype(torch.float32)
    assert wide is not None
    wider = wide.in_dtype(torch.float64)
    assert wider is not None
    assert (wide.dtype, wider.dtype) == (torch.float32, torch.float64)
    assert torch.equal(wider(torch.tensor([PROMPT]), None)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("fault", NATIVE_FAULTS)
def test_faults_are_caught_on_the_default_model(fault: str, smollm2: kvgen.Loaded) -> None:
    prompt = smollm2.tokenizer.encode("Once upon a time,")
    row = run_native(smollm2.model.decoder, fault, prompt, special=2)
    assert row.verdict is Verdict.DIFFERENT
    assert names(row)
    assert names(row) <= NATIVE_FAULTS[fault] | {"unexplained"}


@pytest.mark.parametrize("decoder", TINY, ids=["3 layers", "2 layers", "4 layers"])
def test_the_same_cache_without_a_fault_raises_no_alarm(decoder: Any) -> None:
    row = run_native(decoder, None)
    assert (row.verdict, row.findings) == (Verdict.EQUIVALENT, ())


@pytest.mark.parametrize(
    "fault", first(1, ["positions restart at 0", "one layer not cached", "rows of a batch rolled"])
)
def test_faults_are_caught_in_bf16(fault: str) -> None:
    assert run(SmallDecoder(fault).to(torch.bfloat16)).rows[1].verdict is Verdict.DIFFERENT


# --- The native decoder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", first(2, [torch.float32, torch.bfloat16, torch.float64]), ids=str)
def test_native_patterns_and_their_reasons(dtype: torch.dtype) -> None:
    comparison = run(NativeBackend(make_decoder().to(dtype)), *(name for name in PATTERNS if name != "uncached"))
    rows = {row.pattern.name: row for row in comparison.rows}
    assert rows["full-sequence"].verdict is Verdict.EQUIVALENT
    assert rows["last-token"].verdict is Verdict.DIFFERENT
    assert names(rows["last-token"]) == {"offset lost"}
    assert names(rows["wrong-offset"]) == {"offset wrong"}
    assert names(rows["left-pad-ignored"]) == {"padding read"}
    assert names(rows["stale-chunk"]) == {"harmless here"}
    assert comparison.acceptable  # wrong patterns do not count


@pytest.mark.slow  # `kvgen compare --wrong-pattern` of the README is run
def test_the_default_model_is_equivalent_and_its_wrong_pattern_is_not(smollm2: kvgen.Loaded) -> None:
    prompt = smollm2.tokenizer.encode("Once upon a time,")
    comparison = compare_ids(
        smollm2.model, prompt, patterns=["full-sequence", "last-token"], steps=12, special_ids=frozenset({2})
    )
    full, last = comparison.rows[1:]
    assert (full.verdict, last.verdict) == (Verdict.EQUIVALENT, Verdict.DIFFERENT)
    assert full.exact and all(probe.exact for probe in full.probes)
    assert full.tokens == comparison.rows[0].tokens != last.tokens
    assert full.computed == len(prompt) + 11
    assert comparison.rows[0].computed == sum(range(len(prompt), len(prompt) + 12))


def test_a_given_text_is_forced_on_every_pattern() -> None:
    text = list(range(10, 20))
    comparison = run(NativeBackend(make_decoder()), continuation=text, steps=10)
    assert list(comparison.ids) == PROMPT + text


# --- What is judged by what ---


class EndsAtOnce(SmallDecoder):
    """Chooses token 60 wherever it can, as a model does that ends every text."""

    def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
        logits, cache = super().forward(ids, cache, positions)
        return logits + 50 * (torch.arange(61) == 60), cache


def test_a_text_goes_on_behind_a_token_that_ends_it() -> None:
    """Else no cache would be used, and the wrong pattern would seem right."""
    comparison = run(NativeBackend(make_decoder()), "last-token", special_ids=frozenset(range(50)))
    assert comparison.steps == 24
    assert comparison.rows[1].verdict is Verdict.DIFFERENT
    assert run(EndsAtOnce("positions restart at 0"), special_ids=frozenset({60})).rows[1].verdict is Verdict.DIFFERENT


@pytest.mark.parametrize(("fault", "right"), [("positions restart at 0", "lost"), ("offset one too short", "wrong")])
def test_behind_a_prompt_of_one_token_offsets_are_told_apart(fault: str, right: str) -> None:
    row = compare_ids(PythonBackend(SmallDecoder(fault)), PROMPT[:1], steps=12).rows[1]
    assert names(row) == {f"offset {right}"}


@pytest.mark.parametrize("fault", first(1, ["positions restart at 0", "newest token never stored", "context dropped"]))
@pytest.mark.slow
def test_behind_a_long_prompt_a_shorter_one_is_experimented_on(fault: str) -> None:
    model = SmallDecoder(fault)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    row = compare_ids(PythonBackend(model), torch.arange(700).remainder(61).tolist(), steps=12).rows[1]
    assert names(row) <= FAULTS[fault]
    assert calls < 700


def test_one_step_has_no_cache_to_judge() -> None:
    with pytest.raises(UsageError, match="two steps"):
        run(SmallDecoder(), steps=1)


def test_what_a_cached_call_returns_is_different_if_it_is_no_number() -> None:
    class Broken(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            return (logits if cache is None else logits * torch.nan), new

    row = run(Broken()).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert names(row) == {"not a number"}
    assert row.tokens is None


def test_uncached_logits_that_are_no_numbers_are_an_error() -> None:
    class Broken(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            return logits * torch.nan, new

    with pytest.raises(ModelError, match="not"):
        run(Broken())


def test_a_model_that_reads_a_little_of_later_tokens_is_not_causal() -> None:
    class Leaking(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            return logits + 1e-3 * logits.flip(1).cumsum(1).flip(1), new

    assert names(run(Leaking()).rows[0]) == {"not causal"}


@pytest.mark.parametrize(
    ("change", "message"),
    [(Tensor.long, "logits of int64 on cpu"), (lambda logits: logits.to("meta"), "logits of float32 on meta")],
)
def test_logits_that_cannot_be_compared_are_an_error(change: Callable[[Tensor], Tensor], message: str) -> None:
    class Other(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            return change(logits), new

    with pytest.raises(ModelError, match=message):
        run(Other())


def test_a_model_may_write_all_its_logits_into_one_buffer() -> None:
    buffer = torch.empty(1, 1024, 256)

    class Reusing(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            return buffer[: len(logits), : logits.shape[1], : logits.shape[2]].copy_(logits), new

    assert run(Reusing()).rows[1].verdict is Verdict.EQUIVALENT


def test_tokens_that_a_model_rules_out_are_no_difference() -> None:
    class Padded(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            return torch.cat((logits, logits.new_full((*logits.shape[:2], 3), -torch.inf)), -1), new

    comparison = run(Padded())
    row = comparison.rows[1]
    assert row.verdict is Verdict.EQUIVALENT
    assert 0 < comparison.floor < 1e-4
    assert run(Padded("offset one too far")).rows[1].verdict is Verdict.DIFFERENT


def test_uses_that_were_not_checked_say_why() -> None:
    model = SmallDecoder()
    model.rewinds = False
    notes = {probe.name: probe.note for probe in run(model).rows[1].probes if probe.ratio is None}
    assert set(notes) == {"past a window", "rewinds", "edits", "special tokens"}
    assert all(note.startswith("not checked: ") for note in notes.values())


def test_a_cache_that_fails_where_uncached_decoding_does_not_is_different() -> None:
    class Short(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            if cache is not None and ids.shape[1] > 60:
                raise IndexError("the buffer is full")
            return super().forward(ids, cache, positions)

    row = run(Short()).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert "the buffer is full" in row.findings[0].evidence


class Windowed(SmallDecoder):
    """Says that something changes at 300; its cache is wrong beyond."""

    changes_at = (300, 5000)

    def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
        n = ids.shape[1]
        if cache is not None and n > 300 and self.fault:
            positions = torch.arange(n)
            positions[-1] += 1
        return super().forward(ids, cache, positions)


def test_the_default_goes_past_the_first_window() -> None:
    right = run(Windowed())
    assert right.rows[1].verdict is Verdict.EQUIVALENT
    assert "texts beyond 432 positions, changes at 5000 positions" in right.not_tested
    model = Windowed()
    model.fault = "edit keeps the old suffix"  # any, for `fault` to be set: it is not reached before 300
    row = run(model).rows[1]
    assert {probe.name for probe in row.probes if probe.wrong} >= {"past a window"}


def test_a_wider_twin_shares_the_weights() -> None:
    for backend in (PythonBackend(SmallDecoder().bfloat16()), NativeBackend(make_decoder().bfloat16())):
        twin = subject_of(backend).in_dtype(torch.float32)
        assert twin is not None and twin.module is not None and backend.module is not None
        shared = {parameter.data_ptr() for parameter in backend.module.parameters()}
        assert {parameter.data_ptr() for parameter in twin.module.parameters()} <= shared
        assert twin(torch.tensor([[1, 2, 3]]), None)[0].dtype == torch.float32


# --- References that are none ------------------------------------------------------------------------------------


class NotCausal(torch.nn.Module):
    """Its logits at a position are the mean of what the whole sequence says."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(50, 50, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        rows = self.table[ids]
        return rows + rows.mean(1, keepdim=True), None


def test_a_model_that_is_not_causal_is_not_comparable() -> None:
    comparison = run(NotCausal())
    assert comparison.rows[1].verdict is Verdict.NOT_COMPARABLE
    assert names(comparison.rows[0]) == {"not causal"}
    assert not comparison.acceptable


class Dropping(SmallDecoder):
    def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
        logits, cache = super().forward(ids, cache, positions)
        return torch.nn.functional.dropout(logits, 0.1, training=self.training), cache


def test_a_model_in_training_mode_is_not_comparable_and_its_modules_are_named() -> None:
    model = Dropping()
    model.train()
    comparison = run(model)
    assert comparison.rows[1].verdict is Verdict.NOT_COMPARABLE
    assert "in training mode" in comparison.rows[0].findings[0].evidence


def test_a_model_that_cannot_cache_is_unsupported() -> None:
    model = SmallDecoder()
    model.cannot_cache = "it has no cache"
    row = run(model, steps=4).rows[1]
    assert (row.verdict, row.reason) == (Verdict.UNSUPPORTED, "it has no cache")


def test_a_declared_loss_is_lossy_and_acceptable() -> None:
    model = SmallDecoder("8-bit cache")
    model.lossy = "keys and values in 8 bits"
    comparison = run(model, steps=8)
    assert comparison.rows[1].verdict is Verdict.LOSSY
    assert comparison.rows[1].gap.kl > 0
    assert comparison.acceptable


def test_a_pattern_that_the_model_cannot_be_called_by_is_unsupported() -> None:
    class NoPositions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SmallDecoder()

        def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
            return self.inner(ids, cache)

    assert run(NoPositions(), "wrong-offset").rows[1].verdict is Verdict.UNSUPPORTED


# --- Details -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returns", ["all", "new", "last"])
def test_a_model_may_return_logits_of_all_new_or_last_positions(returns: str) -> None:
    class Model(SmallDecoder):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new_cache = super().forward(ids, cache, positions)
            if returns == "all":
                logits = torch.cat((logits.new_zeros(len(ids), ids.shape[1] - logits.shape[1], 61), logits), 1)
            return (logits[:, -1:] if returns == "last" else logits), new_cache

    comparison = run(Model())
    assert comparison.rows[1].verdict is Verdict.EQUIVALENT


def test_the_text_stays_inside_the_context() -> None:
    backend = NativeBackend(make_decoder())
    backend.context_length = len(PROMPT) + 3
    assert compare_ids(backend, PROMPT, steps=24).steps == 3
    for context in (len(PROMPT), len(PROMPT) + 1):
        backend.context_length = context
        with pytest.raises(UsageError, match=f"of 12 tokens and two steps exceed the context of {context}: shorten it"):
            compare_ids(backend, PROMPT)


def test_unknown_patterns_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'last'.*last-token"):
        run(SmallDecoder(), "last")


@pytest.mark.slow  # `kvgen compare --json` is tested with a small model
def test_the_report_is_json_and_holds_the_numbers(smollm2: kvgen.Loaded) -> None:
    comparison = compare_ids(smollm2.model, [6403, 1980], patterns=["full-sequence", "last-token"], steps=3)
    data = json.loads(json.dumps(as_data(comparison, smollm2.tokenizer), allow_nan=False))
    reference, full, last = data["patterns"]
    assert reference["verdict"] == full["verdict"] == "equivalent"
    assert full["logits"]["max_abs"] < 1e-3 < last["logits"]["max_abs"]
    assert full["completion"] == reference["completion"] != last["completion"]
    assert full["split"] is None
    assert last["completion"][: last["split"]] == reference["completion"][: last["split"]]


# --- generate --verify-cache -------------------------------------------------------------------------------------


def decode(backend: Any, steps: int = 8) -> list[int]:
    tokenizer = kvgen.tokenizer.choose_tokenizer("ids", 61)
    loaded = kvgen.Loaded(backend, tokenizer, "test")
    chunks = kvgen.stream(loaded, PROMPT, kvgen.Sampling(temperature=0), max_tokens=steps)
    return [chunk.step.token for chunk in chunks]


def test_a_right_cache_passes_every_check() -> None:
    backend = PythonBackend(SmallDecoder())
    assert decode(VerifiedBackend(backend, every=1)) == decode(backend)


@pytest.mark.parametrize("every", [1, 3])
def test_a_wrong_cache_stops_the_run(every: int) -> None:
    with pytest.raises(CacheError, match="after 13 positions"):
        decode(VerifiedBackend(PythonBackend(SmallDecoder("positions restart at 0")), every))


def test_a_fault_that_comes_later_is_found_at_its_step() -> None:
    with pytest.raises(CacheError, match="after 26 positions"):
        decode(VerifiedBackend(PythonBackend(SmallDecoder("ring buffer of 24 wraps")), 1), steps=20)


def test_a_wrong_foreign_cache_is_left_out_after_its_first_step() -> None:
    found: list[str] = []
    wrong = VerifiedBackend(PythonBackend(SmallDecoder("positions restart at 0")), None, found.append)
    assert decode(wrong) == decode(PythonBackend(SmallDecoder()))
    assert len(found) == 1


def test_a_loaded_model_is_compared_by_text_or_ids(smollm2: kvgen.Loaded) -> None:
    text = "Once upon a time,"
    comparison = kvgen.compare(smollm2, text, patterns=["full-sequence", "last-token"], steps=3)
    assert comparison.acceptable
    assert [row.verdict for row in comparison.rows] == [Verdict.EQUIVALENT, Verdict.EQUIVALENT, Verdict.DIFFERENT]
    forced = kvgen.compare(smollm2, smollm2.tokenizer.encode(text), continuation=" there was", patterns="last-token")
    assert forced.ids == (*smollm2.tokenizer.encode(text), *smollm2.tokenizer.encode(" there was"))
    assert [row.pattern.name for row in forced.rows] == ["uncached", "last-token"]
    for wrong in ({"prompt": b"x"}, {"steps": 2.5}, {"continuation": 3}, {"patterns": ["no"]}):
        with pytest.raises(UsageError, match="of type bytes|steps is 2.5|of type int|pattern 'no'"):
            kvgen.compare(smollm2, **wrong)


@pytest.mark.parametrize("token", first(1, [198, 49]))
def test_a_text_that_rounding_moves_far_is_no_fault(smollm2_on_torch: kvgen.Loaded, token: int) -> None:
    """The same token twice: a pass of 2 positions and one of 3 round alike, and a cached one 8 to 12 times as far."""
    reference, ids = Reference(subject_of(smollm2_on_torch.model)), torch.tensor([[token, token]])
    longer = torch.tensor([[token, *range(100, 124)]])
    _, cache = smollm2_on_torch.model(longer, None)
    logits, _ = smollm2_on_torch.model(ids, cache)
    assert not reference.judge_step(logits[0, -1], ids).wrong
