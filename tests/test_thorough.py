"""`compare --thorough`: faults that short texts do not show, correct models, and what was not checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvgen.backends.native import NativeBackend
from kvgen.comparison.comparison import PatternResult
from kvgen.comparison.verdict import Verdict
from tests.faults import Cache, SmallDecoder
from tests.sizes import first
from tests.test_cache import CONFIGS, make_decoder
from tests.test_compare import names, run

# fault -> the uses that show it, the finding, and what the wrong logits are like
FAULTS = {
    "large chunks lose their end": ({"chunks of 64", "chunks of 512"}, "chunk boundary", ""),
    "entries are overwritten past 512": ({"past 512 positions", "past 2048 positions"}, "longer texts", ""),
    "only recent edits are noticed": ({"edits of a long text"}, "edits not noticed", "the text before the edit"),
    "a long rewind keeps the old text": ({"rewinds of a long text", "edits of a long text"}, "edits not noticed", ""),
    "a loaded cache has its heads swapped": ({"saved and loaded"}, "saved caches", ""),
    "a fifth row gets the first's keys": ({"2 to 8 rows of a batch"}, "rows mixed", ""),
    "sequences that begin alike are one": ({"sequences that begin alike"}, "sequences mixed", ""),
    "two rows get each other's keys": ({"2 to 8 rows of a batch"}, "rows mixed", ""),
}


class Swapped(Cache):
    def __deepcopy__(self, memo: Any) -> Cache:
        return Cache(self.ids, tuple(k.flip(1) for k in self.keys), self.values, self.prompt)


class LongFault(SmallDecoder):
    def __init__(self, long_fault: str | None, **shape: int) -> None:
        super().__init__(**shape)
        self.long_fault = long_fault
        self.newest: dict[tuple[int, ...], Cache] = {}  # of all sequences with these first tokens

    def forward(self, ids: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> tuple[Tensor, Cache]:
        alike = self.long_fault == "sequences that begin alike are one" and ids.shape[0] == 1
        if alike and cache is not None:
            newest = self.newest.get(tuple(ids[0, :4].tolist()), cache)
            cache = replace(newest, ids=cache.ids) if newest.ids.shape == cache.ids.shape else cache
        logits, written = super().forward(ids, cache, positions)
        if alike:
            self.newest[tuple(ids[0, :4].tolist())] = written
        if self.long_fault == "a loaded cache has its heads swapped":
            written = Swapped(written.ids, written.keys, written.values, written.prompt)
        return logits, written

    def known(self, ids: Tensor, cache: Cache) -> int:
        right = super().known(ids, cache)
        limit = min(cache.ids.shape[1], ids.shape[1] - 1)
        if self.long_fault == "only recent edits are noticed" and cache.ids.shape[0] == 1:
            recent = max(0, limit - 50)
            patched = replace(cache, ids=torch.cat((ids[:, :recent], cache.ids[:, recent:]), 1))
            return super().known(ids, patched)
        if self.long_fault == "a long rewind keeps the old text" and cache.ids.shape[1] - right > 80:
            return limit
        return right

    def join(self, layer: int, k: Tensor, v: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        k, v = super().join(layer, k, v, cache)
        if cache is not None and self.long_fault == "a fifth row gets the first's keys" and len(k) > 4:
            k = torch.cat((k[:4], k[:1], k[5:]))
        if cache is not None and self.long_fault == "two rows get each other's keys" and len(k) == 2:
            k = k.flip(0)
        return k, v

    def store(self, k: Tensor, v: Tensor, cached: bool, count: int, known: int) -> tuple[Tensor, Tensor]:
        keep = torch.arange(k.shape[2])
        if self.long_fault == "large chunks lose their end" and cached and count >= 64:
            keep[-1] = keep[-2]
        if self.long_fault == "entries are overwritten past 512" and len(keep) > 512:
            keep[100] = 99
        return k[:, :, keep], v[:, :, keep]


@dataclass(frozen=True)
class Held:
    """A cache of `SmallDecoder`, and how many calls it was in."""

    cache: Cache
    calls: int


@dataclass(frozen=True)
class Call:
    """A call with a cache. number: of all calls with it. known, new: positions. again: whether no id is new."""

    rows: int
    number: int
    known: int
    new: int
    again: bool


class Slipping:
    """A model whose logits are wrong in the calls that `wrong` chooses; its cache stays right.

    keeps: whether a new cache holds what an earlier text of that length and first three tokens left.
    """

    rewinds = True

    def __init__(self, wrong: Callable[[Call], bool], *, keeps: bool = False) -> None:
        self.decoder, self.wrong, self.keeps = SmallDecoder(), wrong, keeps
        self.kept: dict[tuple[int, ...], Cache] = {}

    def __call__(self, ids: Tensor, held: Held | None = None, /) -> tuple[Tensor, Held]:
        if held is None:
            logits, cache = self.decoder(ids, None)
            kept = self.kept.setdefault((*ids.shape, *ids[0, :3].tolist()), cache) if self.keeps else cache
            return logits, Held(replace(kept, ids=cache.ids), 1)
        known = self.decoder.known(ids, held.cache)
        again = torch.equal(ids, held.cache.ids)
        call = Call(len(ids), held.calls + 1, known, ids.shape[1] - known, again)
        logits, cache = self.decoder(ids, held.cache)
        return logits.roll(1, -1) if self.wrong(call) else logits, Held(cache, call.number)


# fault -> the calls that are wrong, uses that show it, and the finding
SLIPS: dict[str, tuple[Callable[[Call], bool], set[str], str]] = {
    "five new tokens": (lambda call: call.new == 5, {"chunks of 1 to 32", "rows in chunks"}, "chunk boundary"),
    "31 new tokens": (lambda call: call.new == 31, {"chunks of 1 to 32"}, "chunk boundary"),
    "after 60 calls": (lambda call: call.number > 60, {"many calls"}, "many calls"),
    "call 64": (lambda call: call.number == 64, {"many calls"}, "many calls"),
    "call 256": (lambda call: call.number == 256, {"many calls"}, "many calls"),
    "the same text again": (lambda call: call.again, {"the same text twice"}, "stale state"),
    "several new tokens of rows": (lambda call: call.rows > 1 and call.new > 1, {"rows in chunks"}, "rows mixed"),
    # Faults of long texts, which are not blamed on chunks or on the number of calls:
    "a buffer that grows at 200": (
        lambda call: call.known <= 200 < call.known + call.new,
        {"chunks of 1 to 32", "many calls"},
        "longer texts",
    ),
    "a buffer that grows at 300": (
        lambda call: call.known <= 300 < call.known + call.new,
        {"chunks of 1 to 32"},
        "longer texts",
    ),
}


@pytest.mark.parametrize("fault", first(1, SLIPS))
def test_faults_of_few_calls_are_caught_and_located(fault: str) -> None:
    wrong, uses, finding = SLIPS[fault]
    assert run(Slipping(wrong)).rows[1].verdict is Verdict.EQUIVALENT
    row = run(Slipping(wrong), thorough=True).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert uses <= wrong_uses(row)
    assert names(row) == {finding}
    if fault == "five new tokens":
        assert "first after 15 positions (5 new tokens, after 4)" in row.findings[0].evidence


@pytest.mark.slow
def test_a_fault_at_the_end_of_the_context_is_found() -> None:
    model = Slipping(lambda call: call.known >= 697)
    model.context_length = 700  # type: ignore[attr-defined]
    row = run(model, thorough=True).rows[1]
    assert wrong_uses(row) == {"up to the end of the context"} and names(row) == {"longer texts"}


@pytest.mark.slow
def test_a_cache_kept_from_a_text_that_ends_differently_is_found() -> None:
    assert run(Slipping(lambda call: False, keeps=True)).rows[1].verdict is Verdict.EQUIVALENT
    row = run(Slipping(lambda call: False, keeps=True), thorough=True).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert "the same text in new caches" in wrong_uses(row)
    assert names(row) == {"stale state"}


class UnevenlyWrong(NativeBackend):
    """Rows of different lengths get each other's logits if they have several new tokens."""

    def forward_batch(self, sequences: Any, caches: Any, counts: Any) -> Any:
        logits, written = super().forward_batch(sequences, caches, counts)
        several = len(sequences) > 1 and any(cache.reused and cache.computed > 1 for cache in written)
        return [*logits[1:], logits[0]] if several else logits, written


def test_rows_of_different_lengths_with_several_new_tokens_are_tried() -> None:
    model = UnevenlyWrong(make_decoder())
    assert run(model).rows[1].verdict is Verdict.EQUIVALENT
    row = run(model, thorough=True).rows[1]
    assert wrong_uses(row) == {"rows of different lengths in chunks"}
    assert names(row) == {"rows mixed"}


def wrong_uses(row: PatternResult) -> set[str]:
    return {probe.name for probe in row.probes if probe.wrong}


@pytest.mark.parametrize("fault", first(1, FAULTS))
def test_faults_that_the_default_misses_are_caught_and_located(fault: str) -> None:
    uses, finding, like = FAULTS[fault]
    assert run(LongFault(fault)).rows[1].verdict is Verdict.EQUIVALENT  # else this fault shows nothing here
    row = run(LongFault(fault), thorough=True).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert uses <= wrong_uses(row)
    assert names(row) == {finding}
    if like:
        assert any(like in found.evidence for found in row.findings)


@pytest.mark.parametrize("seed", first(1, range(4)))
def test_a_right_model_raises_no_alarm_and_says_what_was_not_checked(seed: int) -> None:
    comparison = run(LongFault(None, seed=seed), thorough=True)
    row = comparison.rows[1]
    assert row.verdict is Verdict.EQUIVALENT
    assert {probe.name for probe in row.probes if probe.note} == {
        "past a window",
        "special tokens",
        "rows of different lengths",
        "rows of different lengths in chunks",
        "left padding",
        "left padding in chunks",
    }
    assert comparison.not_tested == "texts far beyond 2048 positions, batches of more than 8 rows"


@pytest.mark.parametrize("name", first(2, CONFIGS))
def test_mechanisms_of_the_native_decoder_raise_no_alarm(name: str) -> None:
    row = run(NativeBackend(make_decoder(CONFIGS[name])), thorough=True).rows[1]
    assert row.verdict is Verdict.EQUIVALENT
    assert not wrong_uses(row)


def test_rows_are_not_moved_under_a_cache_that_cannot_be_rewound() -> None:
    class Appending(nn.Module):
        """A recurrent network whose cache is a state: it does not notice what was before."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.mix, self.head = nn.Embedding(61, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 61)

        def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
            known, state = cache or (0, None)
            mixed, state = self.mix(self.embed(ids[:, known:]), state)
            return self.head(mixed), (ids.shape[1], state)

    row = run(Appending().eval(), steps=8, thorough=True).rows[1]
    assert row.verdict is Verdict.EQUIVALENT


def test_rows_that_share_a_state_after_an_edit_are_caught() -> None:
    class Sharing(LongFault):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> tuple[Tensor, Any]:
            logits, new = super().forward(ids, cache, positions)
            edited = cache is not None and not torch.equal(ids[:, : cache.ids.shape[1]], cache.ids[:, : ids.shape[1]])
            return (logits[:1].expand_as(logits) if edited else logits), new

    row = run(Sharing(None), steps=8, thorough=True).rows[1]
    assert {probe.name for probe in row.probes if probe.wrong} == {"rows in another order", "edits of rows"}


def test_progress_names_every_use_in_turn() -> None:
    seen: list[tuple[str, int, int]] = []
    row = run(LongFault(None), progress=lambda *use: seen.append(use)).rows[1]
    assert [name for name, _, _ in seen] == [probe.name for probe in row.probes]
    assert [number for _, number, _ in seen] == list(range(len(row.probes)))


def test_a_use_that_reuses_nothing_is_not_checked() -> None:
    class Forgetful(LongFault):
        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> Any:
            logits, _ = super().forward(ids, None)
            return logits, Counted()

    class Counted:
        reused, computed = 0, 1

    row = run(Forgetful(None)).rows[1]
    unused = {probe.name for probe in row.probes if "the cache was not used" in probe.note}
    assert unused == {probe.name for probe in row.probes} - {"past a window", "special tokens"}


def test_no_use_goes_beyond_the_context() -> None:
    class Bounded(LongFault):
        context_length = 150

        def forward(self, ids: Tensor, cache: Any = None, positions: Any = None) -> Any:
            assert ids.shape[1] <= self.context_length
            return super().forward(ids, cache, positions)

    row = run(Bounded(None), thorough=True).rows[1]
    assert row.verdict is Verdict.EQUIVALENT
    assert not [probe.name for probe in row.probes if "fails" in probe.note]
