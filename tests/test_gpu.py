"""Decoding on an NVIDIA GPU, with `--device cuda`; and the kernels for steps in Triton's interpreter, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvgen
from kvgen.cuda.lacking import lacking
from kvgen.model.config import Layer
from kvgen.model.ffns import MLP
from kvgen.model.mixers import Attention, Rotary
from tests.device import DEVICE
from tests.program import run
from tests.test_cache import CONFIG, CONFIGS, ROTARY, TOLERANCE, layer, make_decoder

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="run with --device cuda")

POST_NORMS = frozenset({"attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"})
WIDE = Attention(8, 2, 64, Rotary(tuple(0.7**i for i in range(32))))
OTHERS = {
    "biases": replace(CONFIG, biases=frozenset({"attn.q", "attn.k", "attn.output", "ffn.gate", "ffn.up", "ffn.down"})),
    "post-norms": replace(CONFIG, norms=POST_NORMS, residual_scale=0.5, embedding_scale=2.0),
    "query-norms": replace(CONFIG, layers=tuple(layer(ROTARY, window, qk_norm="head") for window in (5, None))),
    "activations": replace(
        CONFIG, layers=tuple(Layer(layer(ROTARY).mixer, MLP(33, activation=name)) for name in ("gelu", "gelu_tanh"))
    ),
    "partly-rotated": replace(CONFIG, layers=(Layer(Attention(6, 2, 5, Rotary((1.0, 0.3)), scale=0.3), MLP(20)),) * 2),
    "large": replace(CONFIG, dim=3000, layers=(Layer(WIDE, MLP(2500)), Layer(replace(WIDE, window=90), MLP(5000)))),
}
ON_KERNELS = {name: config for name, config in {**CONFIGS, **OTHERS}.items() if lacking(config, torch.float32) is None}
# As a decoder, an editor and a drafter would hand them in: grown, cut, and past windows and the tables of rotations.
LENGTHS = (1, 2, 3, 20, *range(21, 40), 9, 10, 66, 67, 68, *range(250, 262), 30, 31)


def test_the_kernels_have_the_mechanisms_of_dense_models_with_rms_norms() -> None:
    assert {"plain", "windows-and-soft-caps", "sinks-and-soft-caps", "long-rope", *OTHERS} <= ON_KERNELS.keys()
    assert lacking(CONFIGS["experts"], torch.float32) == "other layers than gated MLPs"
    assert lacking(CONFIGS["mamba"], torch.bfloat16) == "layers without attention of their own"
    assert lacking(CONFIGS["parallel"], torch.float32) == "layer norms, parallel blocks, other layers than gated MLPs"
    assert lacking(CONFIGS["streams"], torch.float32).startswith("additions to blocks")
    assert lacking(CONFIG, torch.float64) == "float64"
    assert lacking(OTHERS["partly-rotated"], torch.float32, torch.int8) == "int8 heads of 5 numbers"


@on_gpu
@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ON_KERNELS)
def test_steps_on_kernels_equal_uncached_logits(name: str, stored: torch.dtype | None) -> None:
    from kvgen.cuda.decoder import CudaDecoder

    module = make_decoder(ON_KERNELS[name]).requires_grad_(False)
    if name == "large":
        for parameter in module.parameters():
            parameter.mul_(0.1)
    if (lacked := lacking(module.config, torch.float32, stored)) is not None:
        pytest.skip(lacked)
    decoder = CudaDecoder(module, stored)
    module.kv_dtype = stored
    ids = torch.randint(0, 50, (1, 300), generator=torch.Generator().manual_seed(0))
    cache = other = None
    for length in LENGTHS:
        logits, cache = decoder.forward(ids[:, :length], cache)
        uncached, _ = module(ids[:, :length])
        _, other = decoder.forward(ids[:, 300 - length :], other)  # one graph serves both
        # A rounded key may fall to the other side, which is a step of bf16 or of int8.
        assert (logits - uncached).abs().max() < (TOLERANCE if stored is None else 0.1)


@on_gpu
@pytest.mark.parametrize("name", ON_KERNELS)
def test_steps_in_bf16_are_as_near_to_fp32_as_those_of_torch(name: str) -> None:
    from kvgen.cuda.decoder import CudaDecoder

    exact = make_decoder(ON_KERNELS[name]).requires_grad_(False)
    if name == "large":
        for parameter in exact.parameters():
            parameter.mul_(0.1)
    for parameter in exact.parameters():
        parameter.copy_(parameter.bfloat16())
    module = make_decoder(ON_KERNELS[name]).requires_grad_(False).to(torch.bfloat16)
    module.load_state_dict(exact.state_dict())
    ids = torch.randint(0, 50, (1, 120), generator=torch.Generator().manual_seed(0))
    errors = []
    for forward in (module.forward, CudaDecoder(module).forward):
        cache, squares = None, 0.0
        for length in range(1, 121):
            logits, cache = forward(ids[:, :length], cache)
            squares += float((logits - exact(ids[:, :length])[0]).square().mean())
        errors.append(squares**0.5)
    assert errors[1] < 1.3 * errors[0]


@on_gpu
def test_a_step_waits_for_nothing() -> None:
    from kvgen.cuda.decoder import CudaDecoder

    decoder = CudaDecoder(make_decoder().requires_grad_(False))
    ids = torch.arange(40)[None]
    cache = None
    with torch.inference_mode():
        for length in (10, 11, 12):  # the second step captures
            _, cache = decoder.forward(ids[:, :length], cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            hidden = decoder.extend([decoder._new_span(ids[:, :13], cache, 1)])
            decoder.head(hidden)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_drafts_and_rows_of_a_batch_have_the_logits_of_torch() -> None:
    from kvgen.cuda.decoder import CudaDecoder

    module = make_decoder(CONFIGS["windows"]).requires_grad_(False)
    decoder = CudaDecoder(module)
    ids = torch.randint(0, 50, (2, 60), generator=torch.Generator().manual_seed(0))
    caches = [None, None]
    for length in (20, 21, 25, 24, 26, 27):
        rows = [ids[:1, :length], ids[1:, : length + 3]]
        logits, caches = decoder.forward_batch(rows, caches, [2, 1])
        assert (logits[0] - module.forward(rows[0], None, 2)[0][0]).abs().max() < TOLERANCE
        _, caches[0] = decoder.forward(rows[0], caches[0])
        alone, caches[1] = decoder.forward(rows[1], caches[1])
        assert (alone - logits[1]).abs().max() < TOLERANCE


@on_gpu
def test_engines_say_what_computes(tiny_llama) -> None:
    folder, _ = tiny_llama()
    assert kvgen.load(folder).model.engine == "torch, kernels for steps"
    assert kvgen.load(folder, kernels="off").model.engine == "torch"
    assert kvgen.load(folder, dtype="float64").model.engine == "torch (step kernels lack: float64)"
    assert kvgen.load(folder, device="cpu").model.engine.startswith("C++ kernels")


@on_gpu
@pytest.mark.parametrize("options", [[], ["--kernels", "off"], ["--dtype", "bfloat16"], ["--kv-dtype", "int8"]])
def test_commands_run_on_a_gpu(tiny_llama, tmp_path: Path, options: list[str]) -> None:
    folder, _ = tiny_llama(initializer_range=0.4)
    model = ["-m", str(folder), "--device", "cuda", *options]
    text = run("generate", *model, "-p", "Hello, world", "-t", "0", "-n", "40", "--stats")
    assert text.returncode == 0
    assert " on cuda" in text.stderr
    assert ("kernels for steps" in text.stderr) == ("off" not in options)
    if "--dtype" not in options:
        uncached = run("generate", *model, "-p", "Hello, world", "-t", "0", "-n", "40", "--no-cache")
        assert uncached.stdout == text.stdout
    drafts = run("generate", *model, "-p", "Hello, world", "-t", "0", "-n", "40", "--speculate", "lookup")
    assert drafts.returncode == 0, drafts.stderr
    saved = tmp_path / "saved.cache"
    for _ in range(2):
        again = run("generate", *model, "-p", "Hello, world", "-t", "0", "-n", "40", "--prompt-cache", str(saved))
        assert again.returncode == 0, again.stderr
        assert again.stdout == text.stdout
    compared = run("compare", *model, "-p", "Hello, world, this is a text", "-n", "12")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hello"}\n{"prompt": "World of"}\n')
    for command in (
        ["batch", str(rows), "-o", str(tmp_path / "out.jsonl"), "-n", "9", "-t", "0"],
        ["score", "-p", "Hello, world, this is a text"],
        ["bench", "--prompts", "20", "--contexts", "20", "--lengths", "20"],
        # A number that lies between two of int8 may fall to either side, which is no fault and yet far from rounding.
        ["generate", "-p", "Hello, world", "-n", "9", *([] if "int8" in options else ["--verify-cache"])],
    ):
        done = run(command[0], *model, *command[1:])
        assert done.returncode == 0, (command, done.stderr)


_INTERPRETED = """
import torch
from kvgen.cuda.decoder import CudaDecoder
from tests.test_cache import TOLERANCE
from tests.test_gpu import ON_KERNELS
from tests.test_cache import make_decoder
for name in ("windows-and-soft-caps", "sinks", "biases", "post-norms"):
    module = make_decoder(ON_KERNELS[name])
    decoder = CudaDecoder(module, graphs=False)
    ids, cache = torch.randint(0, 50, (1, 80), generator=torch.Generator().manual_seed(0)), None
    for length in (1, 2, 70, 71):
        logits, cache = decoder.forward(ids[:, :length], cache)
        assert (logits - module(ids[:, :length])[0]).abs().max() < TOLERANCE, (name, length)
"""


@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch where there is a GPU")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "KVGEN_TEST_DEVICE": "cpu"}
    subprocess.run([sys.executable, "-c", _INTERPRETED], env=environment, check=True)
