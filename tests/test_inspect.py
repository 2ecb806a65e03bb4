"""`kvgen inspect`: facts against the loaded model's own, and the obstacle named where there is one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import kvgen
from kvgen import UsageError
from kvgen.loading.inspect import inspect
from kvgen.model.cache import cache_bytes, position_bytes
from tests import program
from tests.families import CONFIGS, make_checkpoint
from tests.sizes import first

run = partial(program.run, "inspect")


def test_the_default_model_is_described(smollm2_on_torch: kvgen.Loaded, smollm2_path: Path) -> None:
    data = json.loads(run(str(smollm2_path), "--json").stdout)
    module = smollm2_on_torch.model.module
    assert data["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert data["backend"] == "native"
    assert data["obstacle"] is data["tokenizer_obstacle"] is None
    assert data["context_length"] == smollm2_on_torch.model.context_length
    assert data["vocabulary"] == smollm2_on_torch.model.vocab_size
    assert data["chat_template"] is True
    assert sum(data["types"].values()) == data["bytes"] <= smollm2_path.stat().st_size


def test_in_a_pipe_there_is_a_line_for_each_subject(smollm2_path: Path) -> None:
    result = run(str(smollm2_path))
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["windows"] == "none"
    assert lines["positions"].startswith("rotary")
    assert lines["parameters"] == "134,515,008"


@pytest.mark.parametrize("kind", first(5, CONFIGS))
def test_the_cache_takes_what_is_said(kind: str, tmp_path: Path) -> None:
    make_checkpoint(kind, 0, tmp_path)
    inspection = inspect(tmp_path)
    assert inspection.kind == kind
    model = kvgen.load(tmp_path, tokenizer="ids").model.decoder
    assert inspection.config == model.config
    assert inspection.cache_bytes_per_token == position_bytes(model.config)
    if model.config.context_length is None:
        assert inspection.cache_bytes_full is None
    else:
        assert inspection.cache_bytes_full == cache_bytes(model.config, 256)
        assert model.config.context_length == 256
    cache = None
    for length in range(1, 257):
        _, cache = model.forward(torch.zeros(1, length, dtype=torch.int64), cache)
    assert cache.nbytes == cache_bytes(model.config, 256)


def test_a_mixture_says_what_a_token_uses(tmp_path: Path) -> None:
    model = make_checkpoint("qwen2_moe", 1, tmp_path)
    lines = dict(line.split(maxsplit=1) for line in run(str(tmp_path)).stdout.splitlines())
    total, idle = sum(parameter.numel() for parameter in model.parameters()), 2 * 4 * 3 * 20 * 32
    assert lines["parameters"] == f"{total:,}, of which a token uses {total - idle:,}"
    assert lines["experts"].startswith("2 of 6, and a shared one of width 7 behind a gate; silu, gated, width 20;")
    assert lines["experts"].endswith("in 2 of 3 layers")
    assert lines["MLP"] == "silu, gated, width 48, in 1 of 3 layers"
    data = json.loads(run(str(tmp_path), "--json").stdout)
    assert (data["experts"], data["active_parameters"]) == (6, total - idle)
    assert kvgen.load(tmp_path, tokenizer="ids", kernels="off").model.step_bytes < 4 * (total - idle)


OBSTACLES: dict[str, tuple[dict[str, Any], str]] = {
    "mixture": ({"model_type": "dbrx"}, "'dbrx' is a mixture of experts"),
    "mixture by its field": ({"model_type": "llama", "num_local_experts": 8}, "num_local_experts is 8"),
    "state space": ({"model_type": "mamba"}, "'mamba' is a state-space"),
    "encoder and decoder": ({"model_type": "t5"}, "'t5' is an encoder-decoder"),
    "encoder and decoder by its field": ({"model_type": "new", "is_encoder_decoder": True}, "encoder-decoder"),
    "unknown": ({"model_type": "never-heard-of"}, "model_type 'never-heard-of' is not supported"),
    "activation": ({"model_type": "llama", "hidden_act": "tanh"}, "hidden_act 'tanh'"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_the_obstacle_is_named(tiny_llama, name: str) -> None:
    folder, _ = tiny_llama()
    changes, message = OBSTACLES[name]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    inspection = inspect(folder)
    assert inspection.backend is None
    assert message in inspection.obstacle
    assert inspection.vocabulary == 384
    result = run(str(folder))
    assert result.returncode == 1
    assert message in result.stdout
    with pytest.raises(kvgen.UnsupportedError) as caught:
        kvgen.load(folder)
    assert str(caught.value) == inspection.obstacle


def test_no_weight_is_read(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = tiny_llama()
    monkeypatch.setattr("kvgen.checkpoint.hf._read_tensor", lambda *_: pytest.fail("a tensor was read"))
    assert inspect(folder).backend == "native"


def test_a_program_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a program"):
        inspect(f"{tmp_path}/model.py:make")


def test_hostile_names_do_not_reach_the_terminal(tiny_llama) -> None:
    folder, _ = tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "\x1b[31mred"}))
    assert "\x1b" not in run(str(folder)).stdout
