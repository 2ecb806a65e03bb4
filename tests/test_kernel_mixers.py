"""Mixers on the kernels, against the same decoder in torch's operations and float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvgen.checkpoint.grouped import quantized
from kvgen.kernels.decoder import KernelDecoder
from kvgen.kernels.packed import PackedMatrix
from kvgen.model.config import DecoderConfig, Layer
from kvgen.model.decoder import Decoder
from kvgen.model.ffns import MLP, ClampedSwiGLU, MoE, Router
from kvgen.model.mixers import Attention, DeltaNet, Mamba2, Mixer, Parallel, Rotary, ShortConv
from tests.sizes import examples

ROTARY = Rotary((1.0, 0.1, 0.01))
SINKS = Attention(4, 2, 10, ROTARY, sinks=True, window=20)
GATED = Attention(3, 1, 8, ROTARY, output_gate=True, qk_norm="head")
KEYS_AS_VALUES = Attention(2, 2, 12, value_norm=True, keys_as_values=True, qk_norm="each-head")
MAMBA2 = Mamba2(6, 10, 2, 7, 4)
MIXERS: dict[str, Mixer | Parallel] = {
    "sinks": SINKS,
    "sinks and caps": replace(SINKS, softcap=3.0, window=None),
    "output gate": GATED,
    "keys as values": KEYS_AS_VALUES,
    "short convolution": ShortConv(70, 3),
    "convolution of one position": ShortConv(24, 1),
    "Mamba 2": MAMBA2,
    "norm before the gate, limits": Mamba2(3, 20, 1, 5, 3, dt_limit=(0.1, 0.5), norm="before-gate"),
    "no norm, whole vectors": Mamba2(2, 64, 1, 16, 2, norm=None),
    "one head in parts": Mamba2(1, 150, 1, 9, 4),
    "delta net": DeltaNet(6, 10, 2, 7, 4),
    "delta net of whole vectors": DeltaNet(2, 64, 1, 32, 2),
    "delta net of one head": DeltaNet(1, 70, 1, 33, 1),
    "in parallel": Parallel((Attention(2, 1, 16, ROTARY), MAMBA2, ShortConv(20, 4))),
}
HYBRID = (
    Layer(MAMBA2, MLP(40)),
    Layer(SINKS, None),
    Layer(None, MoE(Router(5, 2, normalize=True, added_to_sum=0.3), MLP(20, activation=ClampedSwiGLU(1.7, 0.5)))),
    Layer(MIXERS["in parallel"], MLP(33, gated=False, activation="relu2")),
    Layer(DeltaNet(6, 10, 2, 7, 4), MoE(Router(4, 2), MLP(24), MLP(16), latent=18)),
    Layer(GATED, MoE(Router(6, 3, scores="sigmoid"), MLP(11), MLP(16), shared_gate=True)),
)
SIZES = DecoderConfig(96, 512, 32, (), 1e-5, tied_head=False)


def make_decoder(layers: tuple[Layer, ...]) -> Decoder:
    torch.manual_seed(0)
    biases = frozenset({"attn.in_proj", "attn.conv", "attn.1.conv", "attn.out_proj", "ffn.experts.up", "ffn.latent_up"})
    decoder = Decoder(replace(SIZES, layers=layers, biases=biases)).requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        parameter.normal_(std=0.5 if parameter.ndim == 1 else 0.7 * parameter.shape[-1] ** -0.5)
        if name.endswith(".A.weight"):
            parameter.abs_().neg_()
        elif "norm" in name:
            parameter.add_(1)
    return decoder


def on_kernels(decoder: Decoder, bits: int | None = None) -> KernelDecoder:
    """The same weights on the kernels. bits: quantize what can be, in `decoder` too."""
    weights: dict[str, PackedMatrix | Tensor] = {}
    for name, parameter in decoder.named_parameters():
        weights[name] = parameter
        if name.endswith(".weight") and parameter.ndim > 1 and "norm" not in name and ".conv." not in name:
            whole = bits and "router" not in name and parameter.shape[-1] % 32 == 0
            weights[name] = packed = PackedMatrix(quantized(parameter, bits) if bits and whole else parameter)
            parameter.copy_(packed.unpacked())
    return KernelDecoder(decoder.config, weights)


@pytest.fixture(scope="module")
def hybrid() -> KernelDecoder:
    return on_kernels(make_decoder(HYBRID))


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_computes_what_torch_does_in_float64(name: str) -> None:
    decoder = make_decoder((Layer(MIXERS[name], MLP(40)), Layer(MIXERS[name], None)))
    ids = torch.randint(2, 96, (2, 100))
    logits = on_kernels(decoder).all_logits(ids)
    assert (logits - decoder.double().all_logits(ids)).abs().max() < 2e-5 * logits.abs().max()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_hybrid_computes_what_torch_does(bits: int | None) -> None:
    decoder = make_decoder(HYBRID)
    kernels, ids = on_kernels(decoder, bits), torch.randint(2, 96, (1, 150))
    logits, expected = kernels.all_logits(ids), decoder.double().all_logits(ids)
    assert (logits - expected).abs().max() < (2e-5 if bits is None else 1e-3) * expected.abs().max()


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6))
@settings(max_examples=examples(20))
def test_edits_of_a_text_give_the_bits_of_a_fresh_cache(hybrid: KernelDecoder, lengths: list[int]) -> None:
    text, cache = torch.randint(2, 96, (2, 300)), None
    for length in lengths:
        text[:, length // 2 :] = torch.randint(2, 96, (2, 300 - length // 2))
        logits, cache = hybrid.forward(text[:, :length], cache)
        assert torch.equal(logits, hybrid.forward(text[:, :length])[0])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_steps_and_rows_and_threads_change_no_bit(hybrid: KernelDecoder, threads: int) -> None:
    ids, before = torch.randint(2, 96, (3, 90)), torch.get_num_threads()
    together = hybrid.all_logits(ids)
    try:
        torch.set_num_threads(threads)
        alone = torch.cat([hybrid.all_logits(row[None]) for row in ids])
        cache, caches = None, [None] * 3
        for length in (1, 2, 3, 17, 40, 41, 42):
            logits, cache = hybrid.forward(ids[:, :length], cache)
            assert torch.equal(logits[:, 0], together[:, length - 1])
            rows = [row[None, : length + i] for i, row in enumerate(ids)]
            found, caches = hybrid.forward_batch(rows, caches, [1] * 3)
            for i, row in enumerate(found):
                assert torch.equal(row[0], together[i, length - 1 + i])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("most", [1, 3_000_000])
def test_a_long_run_is_divided_into_calls_and_changes_no_bit(
    hybrid: KernelDecoder, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """most: multiplications in one call; with 1, each operation is a call."""
    ids = torch.randint(2, 96, (3, 150))
    expected, called = hybrid.forward(ids)[0], []
    kernels = hybrid._library
    run = SimpleNamespace(kvgen_run=lambda *given: (called.append(None), kernels.kvgen_run(*given)))
    monkeypatch.setattr(hybrid, "_library", run)
    assert torch.equal(hybrid.forward(ids)[0], expected)
    assert len(called) == 2  # the body and the head
    monkeypatch.setattr("kvgen.kernels.decoder._MAX_PRODUCTS", most)
    assert torch.equal(hybrid.forward(ids)[0], expected)
    calls = len(called) - 3
    assert calls == len(hybrid._body) if most == 1 else 1 < calls < len(hybrid._body)


def test_a_run_that_is_interrupted_between_calls_leaves_the_cache_as_it_was(
    hybrid: KernelDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(2, 96, (1, 150))
    expected, kernels = hybrid.forward(ids)[0], hybrid._library
    _, cache = hybrid.forward(ids[:, :40])
    monkeypatch.setattr("kvgen.kernels.decoder._MAX_PRODUCTS", 1)
    for stop in range(1, len(hybrid._body), 7):
        calls = iter(range(stop))

        def run(*given: Any, calls: Iterator[int] = calls) -> None:
            kernels.kvgen_run(*given)
            if next(calls, None) is None:
                raise KeyboardInterrupt

        monkeypatch.setattr(hybrid, "_library", SimpleNamespace(kvgen_run=run))
        with pytest.raises(KeyboardInterrupt):
            hybrid.forward(ids, cache)
        assert cache.length == 40
        monkeypatch.setattr(hybrid, "_library", kernels)
        assert torch.equal(hybrid.forward(ids, cache.branch(40, 200))[0], expected)


def test_an_interrupted_pass_leaves_the_states_as_they_were(hybrid: KernelDecoder) -> None:
    ids = torch.randint(2, 96, (1, 40))
    logits, cache = hybrid.forward(ids[:, :30])
    cache.reserve_states(10)
    assert torch.equal(hybrid.forward(ids[:, :31], cache)[0], hybrid.forward(ids[:, :31])[0])
    assert torch.equal(hybrid.forward(ids[:, :30], cache)[0], logits)


@pytest.mark.parametrize("part", ["in_proj", "conv", "dt", "A"])
def test_what_is_no_number_is_not_lost(part: str) -> None:
    decoder = make_decoder((Layer(MAMBA2, MLP(40)),))
    parameter = decoder.get_parameter(f"blk.0.attn.{part}.weight")
    parameter.view(-1)[-1] = math.nan
    assert on_kernels(decoder).forward(torch.arange(2, 9)[None])[0].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("n", [8_000, 32_000])
def test_a_long_text_has_the_same_bits_cached_and_not(n: int, kv_dtype: torch.dtype) -> None:
    """In passes that end elsewhere: the cache has a length that no pass from the start ends at."""
    attention = Attention(2, 1, 16, ROTARY)
    decoder = on_kernels(make_decoder((Layer(attention, MLP(40)), Layer(replace(attention, window=700), MLP(40)))))
    decoder.kv_dtype = kv_dtype
    ids = torch.randint(2, 96, (1, n))
    _, cache = decoder.forward(ids[:, : n - 4_321])
    _, cache = decoder.forward(ids[:, : n - 1], cache)
    logits, cache = decoder.forward(ids, cache)
    assert (cache.reused, cache.computed, cache.states[0].held(n).keys.dtype) == (n - 1, 1, kv_dtype)
    assert torch.equal(logits, decoder.forward(ids)[0])
