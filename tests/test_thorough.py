"""`compare --thorough`: faults that short texts do not show, correct models, and what was not checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

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
    "a fifth row gets the first's keys": ({"8 rows of a batch"}, "rows mixed", ""),
}


class Swapped(Cache):
    def __deepcopy__(self, memo: Any) -> Cache:
        return Cache(self.ids, tuple(k.flip(1) for k in self.keys), self.values, self.prompt)


class LongFault(SmallDecoder):
    def __init__(self, long_fault: str | None, **shape: int) -> None:
        super().__init__(**shape)
        self.long_fault = long_fault

    def forward(self, ids: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> tuple[Tensor, Cache]:
        logits, written = super().forward(ids, cache, positions)
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
        return k, v

    def store(self, k: Tensor, v: Tensor, cached: bool, count: int, known: int) -> tuple[Tensor, Tensor]:
        keep = torch.arange(k.shape[2])
        if self.long_fault == "large chunks lose their end" and cached and count >= 64:
            keep[-1] = keep[-2]
        if self.long_fault == "entries are overwritten past 512" and len(keep) > 512:
            keep[100] = 99
        return k[:, :, keep], v[:, :, keep]


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
        "left padding",
    }
    assert comparison.not_tested == "texts far beyond 2048 positions, batches of more than 8 rows"


@pytest.mark.parametrize("name", first(2, CONFIGS))
def test_mechanisms_of_the_native_decoder_raise_no_alarm(name: str) -> None:
    row = run(NativeBackend(make_decoder(CONFIGS[name])), thorough=True).rows[1]
    assert row.verdict is Verdict.EQUIVALENT
    assert not wrong_uses(row)


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
