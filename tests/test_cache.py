"""The law of the house: cached logits equal uncached logits, however a sequence is fed, edited or rewound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvgen import CacheError, KVCache, UsageError
from kvgen.model.config import AltUp, DecoderConfig, Layer, LayerInputs
from kvgen.model.decoder import Decoder
from kvgen.model.ffns import MLP, XIELU, ClampedSwiGLU, MLPAndExperts, MoE, Router, SparseMLP
from kvgen.model.mixers import (
    Attention,
    DeltaNet,
    LatentAttention,
    Mamba,
    Mamba2,
    Parallel,
    Rotary,
    SharedAttention,
    ShortConv,
)
from kvgen.model.spans import Span
from tests.device import DEVICE
from tests.sizes import examples, first

VOCAB = 50
TOLERANCE = 2e-5  # fp32 rounding on logits of size 10; measured below 5e-6
ROTARY = Rotary((1.0, 0.1))
GROWING = replace(ROTARY, growth=0.5, growth_length=7)
SLOPES = XIELU(0.7, 1.2, 0.5, -1e-6)


def layer(rotary: Rotary | None = None, window: int | None = None, gated: bool = True, **attention: Any) -> Layer:
    return Layer(Attention(6, 2, 4, rotary, window, **attention), MLP(32, gated))


def short_conv(width: int) -> Layer:
    return Layer(ShortConv(24, width), MLP(32))


def shared(rotary: Rotary, window: int | None = None, state: int = 0) -> Layer:
    return Layer(SharedAttention(Attention(6, 2, 4, rotary, window), state), MLP(32))


def mixture(**router: Any) -> Layer:
    return Layer(layer(ROTARY).mixer, MoE(Router(8, 2, **router), MLP(10), MLP(7), shared_gate=True))


def latent(query_latent_dim: int | None = None) -> Layer:
    return Layer(LatentAttention(6, 3, 5, 11, query_latent_dim, ROTARY, norm_eps=1e-6), MLP(32))


def delta_net() -> Layer:
    return Layer(DeltaNet(heads=6, value_dim=4, key_heads=2, key_dim=5, width=4), MLP(32))


def mamba() -> Layer:
    return Layer(Mamba(inner=48, size=5, width=4, rank=3), MLP(32))


def mamba2(**options: Any) -> Layer:
    return Layer(Mamba2(heads=6, head_dim=8, groups=2, size=5, width=4, **options), MLP(32))


def side_by_side(*layers: Layer) -> Layer:
    return Layer(Parallel(tuple(mixer for layer in layers for mixer in layer.mixers)), MLP(32))


CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    context_length=1024,
    dim=24,
    layers=(layer(ROTARY),) * 3,
    norm_eps=1e-5,
    tied_head=False,
)
CONFIGS = {
    "plain": CONFIG,
    "windows": replace(CONFIG, layers=(layer(ROTARY, 5), layer(), layer(ROTARY, 3))),
    "windows-of-one": replace(CONFIG, layers=(layer(ROTARY, 1), layer(ROTARY, 2), layer(ROTARY))),
    "windows-and-soft-caps": replace(
        CONFIG, layers=tuple(layer(ROTARY, window, softcap=2.0) for window in (5, None, 20)), logit_softcap=9.0
    ),
    "sinks": replace(CONFIG, layers=tuple(layer(ROTARY, window, sinks=True) for window in (5, None, 20))),
    "sinks-and-soft-caps": replace(
        CONFIG, layers=tuple(layer(ROTARY, window, sinks=True, softcap=2.0) for window in (None, 1, None))
    ),
    "clamped-experts": replace(
        CONFIG,
        layers=(
            Layer(Attention(6, 2, 4, ROTARY), MoE(Router(8, 2), MLP(10, activation=ClampedSwiGLU(1.7, 0.8)))),
            Layer(Attention(6, 2, 4, ROTARY), MLP(10, activation=ClampedSwiGLU(1.7, 0.8))),
        ),
    ),
    "norms-after-rotation": replace(
        CONFIG, layers=tuple(layer(ROTARY, window, qk_norm="rotated-head") for window in (None, 4, None))
    ),
    "growing-queries": replace(
        CONFIG, layers=tuple(layer(ROTARY, window, query_rotary=GROWING) for window in (None, 4, None))
    ),
    "learned-slopes": replace(
        CONFIG,
        layers=tuple(
            Layer(Attention(6, 2, 4, ROTARY), MLP(32, False, activation)) for activation in ("relu2", SLOPES, SLOPES)
        ),
    ),
    "learned-positions": replace(CONFIG, layers=(layer(),) * 3, learned_positions=1024),
    "long-rope": replace(CONFIG, layers=(layer(Rotary((1.0, 0.1), 1.1, (0.5, 0.01), 20)), layer(ROTARY), layer())),
    "experts": replace(CONFIG, layers=(mixture(normalize=True), layer(ROTARY), mixture(scores="softmax_of_chosen"))),
    "expert-groups": replace(
        CONFIG,
        layers=(mixture(scores="sigmoid", groups=4, active_groups=2, group_top=2, selection_bias=True, scale=2.5),) * 3,
    ),
    "parallel": replace(
        CONFIG, layers=(layer(ROTARY, gated=False),) * 3, parallel=True, norms=frozenset({"attn_norm"}), norm="layer"
    ),
    "short-convolutions": replace(CONFIG, layers=(short_conv(3), layer(ROTARY), short_conv(1))),
    "short-convolutions-and-windows": replace(CONFIG, layers=(layer(ROTARY, 5), short_conv(4), layer())),
    "mamba-2": replace(CONFIG, layers=(mamba2(), layer(ROTARY), mamba2())),
    "mamba-2-beside-windows": replace(
        CONFIG,
        layers=(
            side_by_side(layer(ROTARY, 5), mamba2(norm=None)),
            Layer(None, MLP(32)),
            side_by_side(mamba2(norm="before-gate"), short_conv(3), layer()),
        ),
    ),
    "delta-nets": replace(CONFIG, layers=(delta_net(), layer(ROTARY, output_gate=True), delta_net())),
    "mamba": replace(CONFIG, layers=(mamba(), layer(ROTARY), mamba())),
    "mamba-2-alone": replace(CONFIG, layers=(replace(mamba2(), ffn=None), mamba2())),
    "latent-attention": replace(CONFIG, layers=(latent(), latent(query_latent_dim=9), latent())),
    "latent-attention-and-windows": replace(CONFIG, layers=(layer(ROTARY, 5), latent(), layer())),
    "shared-keys": replace(
        CONFIG, layers=(layer(ROTARY, 5), layer(ROTARY), shared(ROTARY, 5), shared(ROTARY, state=1), shared(ROTARY, 5))
    ),
    "layers-of-two-sizes": replace(
        CONFIG,
        layers=(
            layer(ROTARY, 5, value_norm=True),
            Layer(Attention(3, 1, 10, ROTARY, value_norm=True, keys_as_values=True), MLP(20)),
        ),
    ),
    "experts-beside-mlps": replace(
        CONFIG,
        norms=frozenset({"attn_norm"}),
        layers=(Layer(layer(ROTARY).mixer, MLPAndExperts(MLP(20), Router(8, 2, normalize=True), MLP(10))),) * 3,
    ),
    "layer-inputs": replace(
        CONFIG, layer_inputs=LayerInputs(6, VOCAB - 5, "gelu_tanh"), block_scales=True, layers=(layer(ROTARY, 4),) * 3
    ),
    "streams": replace(
        CONFIG,
        layers=(Layer(layer(ROTARY).mixer, SparseMLP(MLP(32), 0.5)), layer(ROTARY, 5), shared(ROTARY)),
        layer_inputs=LayerInputs(6, VOCAB, "silu"),
        altup=AltUp(3, 1, True),
        laurel_rank=5,
    ),
    "short-convolutions-alone": replace(CONFIG, layers=(short_conv(5),) * 3),
}


def make_decoder(config: DecoderConfig = CONFIG, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for name, parameter in model.named_parameters():
        if name.endswith(".A.weight"):
            torch.nn.init.uniform_(parameter, -0.3, -0.01)  # a state that lasts
    return model.to(DEVICE)


MODELS = {name: make_decoder(config) for name, config in CONFIGS.items()}
MODELS["delta-nets"].double()  # it divides by numbers near 0: rounding in fp32 would look like a fault
MODEL = MODELS["plain"]
# One of each kind of state, and of each way to choose positions.
_STATES = (
    *("plain", "windows", "long-rope", "experts", "short-convolutions-and-windows", "mamba", "mamba-2", "delta-nets"),
    *("mamba-2-beside-windows", "latent-attention", "shared-keys", "layers-of-two-sizes", "streams"),
)
any_state = pytest.mark.parametrize(
    "model",
    [pytest.param(model, marks=() if name in _STATES else pytest.mark.slow) for name, model in MODELS.items()],
    ids=MODELS,
)

ids_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


def sequence(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


@st.composite
def edited_sequences(draw: st.DrawFn) -> list[list[int]]:
    """Sequences as a decoder, an editor and a drafter would hand them in: grown, cut, changed in the middle."""
    current = draw(ids_lists)
    sequences = [current]
    for _ in range(draw(st.integers(1, 8))):
        keep = draw(st.integers(0, len(current)))
        current = current[:keep] + draw(st.lists(st.integers(0, VOCAB - 1), max_size=12))
        current = current or [0]
        sequences.append(current)
    return sequences


@any_state
@given(sequences=edited_sequences())
def test_cached_logits_equal_uncached_for_any_edits(model: Decoder, sequences: list[list[int]]) -> None:
    cache = None
    previous: list[int] = []
    for ids in sequences:
        cached, cache = model(sequence(*ids), cache)
        uncached, _ = model(sequence(*ids), None)
        assert (cached - uncached).abs().max() < TOLERANCE
        assert cache.tokens.tolist() == [ids]
        reusable = min(common_prefix(previous, ids), len(ids) - 1)
        assert cache.reused == reusable or (cache.reused < reusable and model is not MODEL)
        assert cache.computed == len(ids) - cache.reused
        previous = ids


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@any_state
@given(splits=st.lists(st.integers(1, 30), min_size=1, max_size=8), batch=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_any_split_into_calls_gives_the_logits_of_one_pass(
    model: Decoder, splits: list[int], batch: int, seed: int
) -> None:
    ids = torch.randint(0, VOCAB, (batch, sum(splits)), generator=torch.Generator().manual_seed(seed))
    expected = model.all_logits(ids)
    cache, end = None, 0
    for size in splits:
        end += size
        logits, cache = model(ids[:, :end], cache)
        assert cache.computed == size or (cache.computed == end and model is MODELS["long-rope"])
        assert (logits[:, 0] - expected[:, end - 1]).abs().max() < TOLERANCE


@settings(max_examples=examples(30))
@given(ids_lists, st.data())
def test_logits_after_a_trim_equal_uncached(ids: list[int], data: st.DataObject) -> None:
    _, cache = MODEL(sequence(*ids), None)
    cache.trim(data.draw(st.integers(0, len(ids))))
    longer = [*ids, 1, 2]
    cached, _ = MODEL(sequence(*longer), cache)
    assert (cached - MODEL(sequence(*longer), None)[0]).abs().max() < TOLERANCE


def test_the_whole_sequence_again_computes_one_position() -> None:
    first, cache = MODEL(sequence(1, 2, 3), None)
    again, cache = MODEL(sequence(1, 2, 3), cache)
    assert (cache.reused, cache.computed) == (2, 1)
    assert (first - again).abs().max() < TOLERANCE


@pytest.mark.parametrize("length", first(1, [140, 300]))  # past two sizes of a buffer, or three
@any_state
def test_growth_over_many_steps_keeps_everything(model: Decoder, length: int) -> None:
    ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(3))
    expected = model.all_logits(ids)
    cache = None
    for end in range(1, length + 1):
        logits, cache = model(ids[:, :end], cache)
        assert (logits[:, 0] - expected[:, end - 1]).abs().max() < TOLERANCE


def test_buffers_grow_by_doubling_so_that_copies_stay_few() -> None:
    cache, growths, previous = None, 0, None
    ids = torch.zeros(1, 1000, dtype=torch.int64)
    for end in range(1, 1001):
        _, cache = MODEL(ids[:, :end], cache)
        growths += cache.states[0].buffers is not previous
        previous = cache.states[0].buffers
    assert growths <= 5  # 64, 128, 256, 512, 1024


def test_rows_of_a_batch_reuse_what_all_of_them_share() -> None:
    _, cache = MODEL(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), None)
    changed = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 9, 4, 5]])
    cached, cache = MODEL(changed, cache)
    assert cache.reused == 2
    assert (cached - MODEL(changed, None)[0]).abs().max() < TOLERANCE


def test_another_batch_size_starts_anew() -> None:
    _, cache = MODEL(torch.tensor([[1, 2, 3]]), None)
    both = torch.tensor([[1, 2, 3], [1, 2, 4]])
    cached, cache = MODEL(both, cache)
    assert cache.reused == 0
    assert (cached - MODEL(both, None)[0]).abs().max() < TOLERANCE


def test_the_callers_ids_can_change_afterwards() -> None:
    ids = sequence(1, 2, 3, 4)
    _, cache = MODEL(ids, None)
    ids[0, 1] = 7
    cached, cache = MODEL(ids, cache)
    assert cache.reused == 1
    assert (cached - MODEL(ids, None)[0]).abs().max() < TOLERANCE


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupting_model() -> Iterator[Decoder]:
    model = make_decoder()
    yield model
    for block in model.blk:
        block._forward_pre_hooks.clear()


def test_an_interrupted_pass_leaves_the_cache_right(interrupting_model: Decoder) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    model = interrupting_model
    _, cache = model(sequence(1, 2, 3), None)
    handle = model.blk[1].register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        model(sequence(1, 2, 3, 4, 5), cache)
    handle.remove()
    assert cache.tokens.tolist() == [[1, 2, 3]]
    cached, _ = model(sequence(1, 2, 3, 6), cache)
    assert (cached - model(sequence(1, 2, 3, 6), None)[0]).abs().max() < TOLERANCE


def test_the_last_pass_has_every_position_that_logits_are_wanted_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgen.model.causal_lm.PREFILL_CHUNK", 8)
    ids = torch.randint(0, 11, (1, 40))
    expected = MODEL.all_logits(ids)
    for n, last in itertools.product(range(6, 30), (1, 2, 5)):
        logits, _ = MODEL.forward(ids[:, :n], None, last)
        assert (logits - expected[:, n - last : n]).abs().max() < TOLERANCE


@pytest.mark.parametrize("dim", [64, 2048])
def test_passes_become_shorter_where_positions_attend_to_more(dim: int) -> None:
    layers = (Layer(Attention(dim // 64, 1, 64), MLP(4 * dim)),) * 20
    with torch.device("meta"):
        model = Decoder(DecoderConfig(100, None, dim, layers, 1e-5, tied_head=True))
    cache = KVCache(model)
    sizes = {
        start: model._chunk_size(Span(torch.zeros(1, 9999, dtype=torch.int64), cache, start, 10**6))
        for start in (0, 8_000, 32_000, 100_000, 900_000)
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert sizes[900_000] >= 24
    for start, size in sizes.items():
        assert size in (24, 512) or size * model.config.products_at(start + size) <= 1.2e11
    assert sizes[0] == (512 if dim == 64 else 96)
    assert sizes[100_000] < sizes[0]


def test_a_window_bounds_what_a_position_attends_to() -> None:
    config = DecoderConfig(100, None, 32, (Layer(Attention(4, 2, 8, window=50), None),), 1e-5, tied_head=True)
    assert config.products_at(20) - config.products == 4 * 16 * 20
    assert config.products_at(5000) - config.products == 4 * 16 * 50


def test_a_cache_of_another_model_is_refused() -> None:
    _, cache = MODEL(sequence(1, 2), None)
    with pytest.raises(CacheError, match="another model"):
        make_decoder(seed=1)(sequence(1, 2, 3), cache)


def test_a_cache_that_nobody_wrote_can_be_handed_in() -> None:
    cache = KVCache()
    _, returned = MODEL(sequence(1, 2), cache)
    assert returned is cache
    assert cache.tokens.tolist() == [[1, 2]]


def test_a_model_in_fewer_bits_keeps_its_positions() -> None:
    model = make_decoder().to(torch.bfloat16)
    assert torch.equal(model.rotaries[0].frequencies, MODEL.rotaries[0].frequencies)
    assert make_decoder().to(torch.float64).rotaries[0].frequencies.dtype == torch.float64


WINDOWED = make_decoder(replace(CONFIG, layers=(layer(ROTARY, 8),) * 3))


def test_a_window_keeps_only_its_positions() -> None:
    cache = None
    sizes = set()
    for end in range(1, 400):
        _, cache = WINDOWED(torch.zeros(1, end, dtype=torch.int64), cache)
        sizes.add(cache.nbytes)
    row = 3 * 2 * CONFIG.attention.kv_heads * CONFIG.attention.head_dim * 4
    assert max(sizes) <= (8 - 1 + 2 * 8) * row
    assert WINDOWED(torch.zeros(1, 500, dtype=torch.int64), None)[1].nbytes <= (8 - 1 + 2 * 8) * row


def test_a_trim_that_a_window_cannot_undo_is_refused() -> None:
    ids = torch.randint(0, VOCAB, (1, 100), generator=torch.Generator().manual_seed(5))
    _, cache = WINDOWED(ids, None)
    with pytest.raises(CacheError, match="sliding window"):
        cache.trim(50)
    assert cache.length == 100
    cache.trim(92)  # the slack: as many positions as the window
    logits, cache = WINDOWED(ids[:, :94], cache)
    assert cache.reused == 92
    assert (logits - WINDOWED(ids[:, :94], None)[0]).abs().max() < TOLERANCE
    logits, cache = WINDOWED(ids[:, :50], cache)  # the contract never fails: what is lost is computed anew
    assert cache.reused == 0
    assert (logits - WINDOWED(ids[:, :50], None)[0]).abs().max() < TOLERANCE


def test_a_pass_that_is_interrupted_loses_nothing_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, VOCAB, (1, 80), generator=torch.Generator().manual_seed(6))
    _, cache = WINDOWED(ids[:, :20], None)
    with monkeypatch.context() as patch:
        patch.setattr(WINDOWED.blk[2].attn, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            WINDOWED(ids, cache)
    logits, cache = WINDOWED(ids[:, :21], cache)
    assert cache.reused == 20
    assert (logits - WINDOWED(ids[:, :21], None)[0]).abs().max() < TOLERANCE


def test_a_trim_to_more_than_is_there_is_refused() -> None:
    cache = KVCache()
    with pytest.raises(CacheError, match="cannot trim"):
        cache.trim(1)


def test_reset_forgets_everything() -> None:
    _, cache = MODEL(sequence(1, 2, 3), None)
    cache.reset()
    assert cache.length == 0
    cached, cache = MODEL(sequence(1, 2, 3, 4), cache)
    assert cache.reused == 0
    assert (cached - MODEL(sequence(1, 2, 3, 4), None)[0]).abs().max() < TOLERANCE


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        MODEL(torch.empty(1, 0, dtype=torch.int64), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_the_law(dtype: torch.dtype) -> None:
    model = make_decoder().to(dtype)
    ids = torch.randint(0, VOCAB, (1, 60), generator=torch.Generator().manual_seed(5))
    expected = model.all_logits(ids)
    # bf16 keeps 8 bits: after each of some 30 operations values of size 10 are off by up to 2^-8 of themselves.
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.4}[dtype]
    cache = None
    for end in range(1, 61):
        logits, cache = model(ids[:, :end], cache)
        assert (logits[:, 0] - expected[:, end - 1]).abs().max() < tolerance
