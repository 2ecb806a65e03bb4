"""Recurrent layers: which snapshots are kept, what is computed again, and that it is right."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgen
from kvgen import CacheError, KVCache
from kvgen.comparison.verified import VerifiedBackend
from kvgen.generation.batch import Batch
from kvgen.generation.conversation import Conversation
from kvgen.generation.prompt_cache import describe_prompt_cache, load_prompt_cache, save_prompt_cache
from kvgen.generation.settings import Request
from kvgen.loading.load import Loaded
from kvgen.model import mamba, mamba2, recurrent
from kvgen.model.cache import cache_bytes, snapshot_bytes
from kvgen.model.decoder import Decoder
from kvgen.model.recurrent import RECENT, SPACING, Parts, RecurrentState, snapshot_count, snapshot_ends
from tests.device import DEVICE
from tests.families import make_model
from tests.sizes import examples, first
from tests.test_cache import CONFIGS, MODELS, TOLERANCE, VOCAB

GREEDY = kvgen.Sampling(temperature=0)
HYBRID = MODELS["short-convolutions"]
LONG = 900  # positions: several long snapshots


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def edited(ids: torch.Tensor, at: int) -> torch.Tensor:
    changed = ids.clone()
    changed[0, at] = (changed[0, at] + 1) % VOCAB
    return changed


def right(model: Decoder, ids: torch.Tensor, cache: KVCache) -> KVCache:
    """Compute `ids` with a cache, which must make no difference."""
    logits, cache = model(ids, cache)
    assert (logits - model(ids, None)[0]).abs().max() < TOLERANCE
    return cache


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A hybrid with one byte a token, and with room for ten turns."""
    folder = tmp_path_factory.mktemp("hybrid")
    kinds = {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}
    make_model("lfm2", kinds | {"vocab_size": 256, "max_position_embeddings": 8192}).save_pretrained(folder)
    return kvgen.load(folder, tokenizer="bytes")


# --- Snapshots ----------------------------------------------------------------------------------------------------


def counting(inputs: Parts, state: Parts) -> tuple[torch.Tensor, Parts]:
    """The state is the sum of all inputs, (B, 1), and the output all sums, (B, T, 1)."""
    sums = state[0][:, None] + inputs[0].cumsum(1)
    return sums, (sums[:, -1],)


def advance(state: RecurrentState, start: int, end: int, wanted: set[int] = frozenset()):
    ones = (torch.ones(1, end - start, 1),)
    out = state.run(counting, ones, start, wanted)
    assert out.flatten().tolist() == list(range(start + 1, end + 1))
    return state


def kept(state: RecurrentState) -> list[int]:
    assert all(parts[0].item() == at for at, parts in state.snapshots.items())
    return list(state.snapshots)


def empty(most: int = 1000) -> RecurrentState:
    return RecurrentState((torch.zeros(1, 1),), most)


def test_a_long_pass_keeps_each_256th_position_and_those_that_are_wanted() -> None:
    state = advance(empty(), 0, 600, {599})
    state.commit()
    assert kept(state) == [256, 512, 599, 600]
    advance(state, 600, 1000, {700, 1200}).commit()
    assert kept(state) == [256, 512, 599, 700, 768, 1000]


def test_steps_keep_the_newest_and_each_64th() -> None:
    state = empty()
    for end in range(1, 301):
        advance(state, end - 1, end).commit()
    assert kept(state) == [64, 128, 192, 256, *range(300 - RECENT + 1, 301)]
    assert len(kept(state)) == snapshot_count(300, 1000)


def test_a_pass_counts_from_commit_on_and_replaces_what_was_rewound() -> None:
    state = advance(empty(), 0, 10)
    assert kept(state) == []
    state.commit()
    assert kept(state) == list(range(1, 11))
    advance(state, 4, 6)  # is interrupted
    assert kept(state) == list(range(1, 11))
    advance(state, 4, 7).commit()
    assert kept(state) == list(range(1, 8))
    assert [state.reach(length) for length in (0, 5, 7, 100)] == [0, 5, 7, 7]


def test_a_branch_keeps_what_it_has_when_its_origin_goes_on() -> None:
    state = advance(empty(), 0, 600, {599})
    state.commit()
    branch = state.branch(599, 0)
    assert kept(branch) == [256, 512, 599]
    advance(state, 256, 300).commit()
    advance(branch, 599, 640).commit()
    assert kept(state) == [256, 300]
    assert kept(branch) == [256, 512, 599, 640]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 30)), min_size=1, max_size=12),
    most=st.integers(4, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=examples(60))
def test_there_are_never_more_than_was_said_and_the_last_is_among_them(
    sizes: list[tuple[int, int]], most: int, seed: int
) -> None:
    state, length, random = empty(most), 0, Random(seed)
    for size, back in sizes:
        length = state.reach(max(0, length - back))
        end = length + size
        advance(state, length, end, {random.randrange(length, end + 1) for _ in range(3)}).commit()
        length = end
        assert len(kept(state)) <= snapshot_count(length, most)
        assert kept(state)[-1] == length
        assert kept(state) == sorted(kept(state))


def test_with_little_room_snapshots_lie_closer_near_the_end() -> None:
    state = empty(8)
    for end in range(1, 2001):
        advance(state, end - 1, end).commit()
    distances = [2000 - at for at in kept(state)]
    assert len(distances) == 8
    assert distances[-1] == 0
    assert distances[-2] == 1
    assert distances[0] > 300
    gaps = [far - near for far, near in pairwise(distances)]
    assert gaps == sorted(gaps, reverse=True)


def test_what_does_not_fit_is_not_restored() -> None:
    state = advance(empty(), 0, 300, {299})
    state.commit()
    held = state.held(300).tensors
    again = empty()
    again.restore(held, 300, 0)
    assert kept(again) == [256, 299, 300]
    bad = [
        {},  # without the last
        {"state.256.0": held["state.256.0"]},
        held | {"state.301.0": torch.zeros(1, 1)},
        held | {"state.0.0": torch.zeros(1, 1)},
        held | {"state.300.0": torch.zeros(1, 2)},
        held | {"state.300.0": torch.zeros(1, 1).double()},
        held | {"state.300.1": torch.zeros(1, 1)},
        held | {"keys": torch.zeros(1, 1)},
        held | {"state.9999999999999.0": torch.zeros(1, 1)},
    ]
    for tensors in bad:
        with pytest.raises(CacheError, match="a recurrent layer"):
            empty().restore(tensors, 300, 0)


def test_ends_of_a_pass() -> None:
    assert snapshot_ends(5, 9, [7]) == [6, 7, 8, 9]
    assert snapshot_ends(250, 800, [250, 300, 800, 801]) == [256, 300, 512, 768, 800]


# --- What a model computes again ----------------------------------------------------------------------------------


def test_all_layers_keep_the_same_positions() -> None:
    _, cache = HYBRID(text(LONG), None)
    for end in (LONG + 1, LONG + 2, LONG - 3, LONG + 30):
        cache = right(HYBRID, text(LONG + 50)[:, :end], cache)
        recurrent_states = [state for state in cache.states if isinstance(state, RecurrentState)]
        assert len(recurrent_states) == 2
        assert list(recurrent_states[0].snapshots) == list(recurrent_states[1].snapshots)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.recurrences])
@pytest.mark.parametrize("at", first(3, [3, 256, LONG - 1, 255, 257, 500, LONG - 2]))
def test_an_edit_computes_less_than_512_positions_before_it(name: str, at: int) -> None:
    if "windows" in name:
        pytest.skip("a window cannot go back so far")
    model = MODELS[name]
    _, cache = model(text(LONG), None)
    cache = right(model, edited(text(LONG), at), cache)
    assert cache.reused <= at
    assert at - cache.reused <= 256
    again = edited(edited(text(LONG), at), at)  # at the same place: now there is a snapshot
    cache = right(model, again, cache)
    assert cache.reused == at


def test_after_a_rewind_of_a_few_steps_nothing_is_computed_again() -> None:
    cache = None
    for end in range(1, 101):
        _, cache = HYBRID(text(100)[:, :end], cache)
    for back in range(1, RECENT):
        cache = right(HYBRID, edited(text(100), 100 - back)[:, : 101 - back], cache.branch(100, 0))
        assert cache.reused == 100 - back
        _, cache = HYBRID(text(100), cache)


def test_the_whole_sequence_again_computes_one_position() -> None:
    for length in (5, 100, 600):
        _, cache = HYBRID(text(length), None)
        cache = right(HYBRID, text(length), cache)
        assert (cache.reused, cache.computed) == (length - 1, 1)


def test_a_pass_that_is_interrupted_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache = HYBRID(text(80)[:, :20], None)
    with monkeypatch.context() as patch:
        patch.setattr(HYBRID.blk[2].attn, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            HYBRID(text(80), cache)
    cache = right(HYBRID, text(80)[:, :21], cache)
    assert cache.reused == 20


def test_a_trim_to_a_place_without_a_snapshot_is_refused() -> None:
    _, cache = HYBRID(text(300), None)
    with pytest.raises(CacheError, match="no snapshot"):
        cache.trim(100)
    cache.trim(256)
    right(HYBRID, text(300), cache)


def test_chunks_of_a_prompt_give_the_bits_of_steps() -> None:
    """The sums of a short convolution are in one order."""
    model = MODELS["short-convolutions-alone"]
    conv = model.blk[0].attn
    x = torch.randn(1, 50, 24, device=DEVICE)
    whole, _ = conv.conv(x, torch.zeros(1, 4, 24, device=DEVICE))
    state, parts = torch.zeros(1, 4, 24, device=DEVICE), []
    for start, end in pairwise([0, 1, 2, 3, 10, 11, 50]):
        part, state = conv.conv(x[:, start:end], state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_a_chunked_scan_is_the_recurrence() -> None:
    """Step by step as the paper defines it, in fp64."""
    generator, length, state = torch.Generator().manual_seed(1), 200, torch.randn(2, 6, 4, 5).double()
    x, b, c = (torch.randn(2, length, *size, generator=generator).double() for size in ((6, 4), (3, 5), (3, 5)))
    log_a = -torch.rand(2, length, 6, generator=generator).double()
    expected, h = [], state
    for t in range(length):
        read, write = (part[:, t].repeat_interleave(2, dim=1) for part in (c, b))  # (B, H, N)
        h = log_a[:, t, :, None, None].exp() * h + x[:, t, :, :, None] * write[:, :, None]
        expected.append((h * read[:, :, None]).sum(-1))
    actual, last = mamba2.scan(x, log_a, b, c, state)
    assert (actual - torch.stack(expected, dim=1)).abs().max() < 1e-12
    assert (last - h).abs().max() < 1e-12


def test_a_selective_scan_is_the_recurrence() -> None:
    """Step by step as the paper defines it, in fp64."""
    generator, length, state = torch.Generator().manual_seed(1), 50, torch.randn(2, 6, 5).double()
    x, dt, b, c = (torch.randn(2, length, size, generator=generator).double() for size in (6, 6, 5, 5))
    a, dt = -torch.rand(6, 5, generator=generator).double(), dt.exp()
    expected, h = [], state
    for t in range(length):
        h = (dt[:, t, :, None] * a).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        expected.append((h * c[:, t, None]).sum(-1))
    actual, last = mamba.scan(x, dt, a, b, c, state)
    assert (actual - torch.stack(expected, dim=1)).abs().max() < 1e-12
    assert (last - h).abs().max() < 1e-12


def test_snapshots_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = snapshot_bytes(CONFIGS["short-convolutions-alone"])
    monkeypatch.setattr(recurrent, "_MAX_BYTES", 9 * one)
    model, cache = MODELS["short-convolutions-alone"], None
    for end in (700, *range(701, 760), 1000):
        cache = right(model, text(1000)[:, :end], cache) if cache else model(text(1000)[:, :end], None)[1]
        assert cache.nbytes <= 9 * one == cache_bytes(model.config, 1000)
        assert cache.nbytes_held == one
    _, both = model(text(1000).repeat(2, 1), None)
    assert both.nbytes <= 9 * one


def test_a_model_without_attention_costs_the_same_at_any_length() -> None:
    config = CONFIGS["short-convolutions-alone"]
    assert cache_bytes(config, 10**9) == cache_bytes(config, 10**8) < 2**28 + snapshot_bytes(config)


# --- What is made of it -------------------------------------------------------------------------------------------


class Meter:
    """Adds up the positions that a model computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
        self.rows = 0
        plain = loaded.model.decoder.extend

        def extend(spans):
            self.rows += sum(span.rows for span in spans)
            return plain(spans)

        monkeypatch.setattr(loaded.model.decoder, "extend", extend)

    def take(self) -> int:
        rows, self.rows = self.rows, 0
        return rows


def test_ten_turns_compute_at_most_64_positions_again(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a template that writes an answer other than it was generated, as many do."""
    tokenizer = loaded.tokenizer
    monkeypatch.setattr(
        type(tokenizer),
        "encode_chat",
        lambda self, messages: self.encode("".join(f"[{m['role']}] {m['content'].strip()}\n" for m in messages)),
    )
    talk = Conversation(loaded, Request((), GREEDY, 90))
    meter, known = Meter(monkeypatch, loaded), []
    for turn in range(10):
        chunks = list(talk.ask("What is a river? " * (1 + 7 * turn % 30)))
        prompt = tokenizer.encode_chat(talk.messages[:-1])
        shared = next((n for n, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), len(known))
        assert 0 <= shared - chunks[0].step.reused <= SPACING
        assert meter.take() == len(prompt) - chunks[0].step.reused + len(chunks) - 1
        fresh = [c.step.token for c in kvgen.stream(loaded, prompt, GREEDY, max_tokens=90)]
        assert [chunk.step.token for chunk in chunks] == fresh
        known, _ = [*prompt, *fresh], meter.take()


def test_rows_that_begin_alike_compute_the_beginning_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    beginning, random = [7, 8, 9] * 50, Random(0)
    requests = [Request([*beginning, *random.choices(range(256), k=20)], GREEDY, 5) for _ in range(6)]
    expected = [[c.step.token for c in kvgen.stream(loaded, r.prompt, GREEDY, max_tokens=5)] for r in requests]
    meter, found = Meter(monkeypatch, loaded), [[] for _ in requests]
    for number, chunk in Batch(loaded, batch_size=8).run(iter(requests)):
        found[number].append(chunk.step.token)
    assert found == expected
    assert meter.take() == 150 + 6 * (20 + 4)


def test_drafts_change_nothing_and_are_not_computed_again(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(b"one two three one two three one two")
    plain = [c.step.token for c in kvgen.stream(loaded, prompt, GREEDY, max_tokens=60)]

    class Script:
        """Half right."""

        def draft(self, tokens, most):
            at = len(tokens) - len(prompt)
            return [*plain[at : at + 4], 3, 3][:most]

        def learn(self, drafted, accepted):
            pass

    meter = Meter(monkeypatch, loaded)
    steps = [c.step for c in kvgen.stream(loaded, prompt, GREEDY, max_tokens=60, drafter=Script())]
    assert [step.token for step in steps] == plain
    assert sum(step.guessed for step in steps) > 40
    assert meter.take() <= len(prompt) + 6 + 12 * 7


def test_a_prompt_cache_resumes_from_the_last_snapshot(loaded: Loaded, tmp_path: Path) -> None:
    prompt = [5, 6, 7, 8] * 200
    batch = Batch(loaded)
    first = [c.step.token for c in batch.complete(Request(prompt, GREEDY, 30))]
    save_prompt_cache(tmp_path / "x", batch.cache, loaded)
    known = [*prompt, *first]
    for ids, reused in (
        ([*known, 9], len(known) - 1),
        (prompt, len(prompt) - 1),
        ([*prompt[:600], 1, 2], 512),
        ([*prompt, *first[:20], 1], 799),
    ):
        cache = load_prompt_cache(tmp_path / "x", loaded)
        logits, cache = loaded.model(torch.tensor([ids]), cache)
        assert cache.reused == reused
        assert (logits - loaded.model(torch.tensor([ids]), None)[0]).abs().max() < 1e-4
    assert describe_prompt_cache(tmp_path / "x").layers == 3


def test_caches_take_no_more_than_was_counted(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, random, largest = loaded.model, Random(1), 0.0
    plain = model.forward_batch

    def forward(sequences, caches, counts):
        nonlocal largest
        logits, written = plain(sequences, caches, counts)
        pairs = zip(sequences, written, strict=True)
        shares = [cache.nbytes / model.cache_bytes(len(ids[0]) + 200) for ids, cache in pairs]
        largest = max(largest, *shares)
        return logits, written

    monkeypatch.setattr(model, "forward_batch", forward)
    requests = [Request(random.choices(range(256), k=random.randint(1, 700)), GREEDY, 60) for _ in range(6)]
    list(Batch(loaded, batch_size=4).run(iter(requests)))
    assert 0.1 < largest <= 1


def test_verify_cache_finds_it_right(loaded: Loaded) -> None:
    verified = VerifiedBackend(loaded.model, 1)
    cache = None
    for end in (40, *range(41, 60), 30, 50):
        _, cache = verified(text(60)[:, :end], cache)
