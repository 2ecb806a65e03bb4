"""Latent attention: what the cache keeps, what inspect says, and which variants are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

import kvgen
from kvgen import CacheError
from kvgen.backends.native import NativeBackend
from kvgen.loading.convert import library_config
from kvgen.model.cache import cache_bytes, position_bytes
from tests import gguf_files, program
from tests.families import LATENT, make_checkpoint, make_model

IDS = torch.arange(2, 42)[None]
KINDS = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
every_kind = pytest.mark.parametrize("kind", KINDS)


def load(path: Path, **options: Any) -> NativeBackend:
    model = kvgen.load(path, tokenizer="ids", **options).model
    assert isinstance(model, NativeBackend)
    return model


@pytest.fixture
def model(tmp_path: Path) -> NativeBackend:
    make_checkpoint("deepseek_v3", 0, tmp_path)
    return load(tmp_path)


def test_the_cache_keeps_one_latent_and_one_rotated_key_a_position(model: NativeBackend) -> None:
    _, cache = model(IDS)
    numbers = LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"]
    assert cache.nbytes_held == 3 * 40 * numbers * 4 == cache_bytes(model.decoder.config, 40)
    assert [sorted(held.tensors.items())[0][1].shape for held in cache.held()] == [(1, 1, 40, 6)] * 3


def test_positions_of_the_past_are_not_projected(model: NativeBackend) -> None:
    """The cost of a step does not grow with the past but for scores and sums over latents."""
    _, cache = model(IDS)
    shapes = []
    for block in model.decoder.blk:
        for part in (block.attn.kv_a, block.attn.q_b, block.attn.output):
            part.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[0]))
        block.attn.k_b.register_forward_pre_hook(lambda *_: pytest.fail("keys were made"))
        block.attn.v_b.register_forward_pre_hook(lambda *_: pytest.fail("values were made"))
    model(torch.cat((IDS, IDS[:, :1]), dim=1), cache)
    assert shapes == [1] * 9


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.2), ("bfloat16", 0.1)])
def test_caches_of_fewer_bits(dtype: str, bound: float, model: NativeBackend, tmp_path: Path) -> None:
    small = load(tmp_path, kv_dtype=dtype)
    expected, cache = model.all_logits(IDS), None
    for length in (20, 21, 22, 40):
        logits, cache = small(IDS[:, :length], cache)
        assert 0 < (logits[:, 0] - expected[:, length - 1]).abs().max() < bound
    kv_dtype = {"int8": torch.int8, "bfloat16": torch.bfloat16}[dtype]
    width = 11 + 6 + 8 if dtype == "int8" else 2 * (11 + 6)  # two scales of four bytes
    assert small.position_bytes == position_bytes(model.decoder.config, kv_dtype) == 3 * width
    assert cache is not None and cache.nbytes_held == 40 * small.position_bytes == small.cache_bytes(40)


def test_a_cache_can_be_copied_and_restored(model: NativeBackend) -> None:
    expected, cache = model(IDS)
    layers = [held.tensors for held in cache.held()]
    again, restored = model(IDS, model.restored(cache.tokens, layers, 0))
    assert restored.reused == 39 and torch.allclose(again, expected, atol=1e-5)
    branch = model.cache_for(IDS[:, :31], 50, [cache])
    again, branch = model(IDS, branch)
    assert branch.reused == 30 and torch.allclose(again, expected, atol=1e-5)
    swapped = [{"keys": layer["values"], "values": layer["keys"]} for layer in layers]
    with pytest.raises(CacheError, match=r"shape \(1, 1, 40, 11\)"):
        model.restored(cache.tokens, swapped, 0)


def test_inspect_describes_it(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", 0, tmp_path)
    result = program.run("inspect", str(tmp_path))
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    heads = "4 heads of size 13, values of size 9"
    assert lines["MLA"] == f"latent attention, {heads}; caches 11 + 6 numbers a token"
    assert "rotary on 6 of 13 dimensions" in result.stdout
    assert "(kernels lack: latent attention)" in result.stdout
    data = json.loads(program.run("inspect", str(tmp_path), "--json").stdout)
    assert (data["heads"], data["kv_heads"], data["head_dim"]) == (4, 1, 13)
    assert data["cache_bytes_per_token"] == 3 * 17 * 4


@every_kind
def test_layers_that_predict_further_tokens_are_ignored(kind: str, tmp_path: Path) -> None:
    make_checkpoint(kind, 0, tmp_path)
    expected = load(tmp_path).all_logits(IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(32, 64)
    tensors["model.layers.3.self_attn.kv_b_proj.weight"] = torch.ones(48, 11)
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).all_logits(IDS), expected)


def test_a_gguf_file_that_does_not_name_its_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a bias for choosing experts says that they are sigmoids."""
    reference = make_model("deepseek_v3", LATENT | {"num_mtp_layers": 0})
    monkeypatch.setattr(GGUFWriter, "add_expert_gating_func", lambda *_: None)
    gguf_files.write_gguf(tmp_path / "tiny.gguf", "deepseek_v3", reference)
    with torch.inference_mode():
        expected = reference(IDS, use_cache=False).logits
    assert (load(tmp_path / "tiny.gguf").all_logits(IDS) - expected).abs().max() < 1e-4


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.7}}, "partial_rotary"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types must have"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_other_variants_are_refused(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_checkpoint(kind, 0, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(kvgen.KvgenError, match=re.escape(message)):
        kvgen.load(tmp_path, tokenizer="ids")


def test_queries_that_grow_with_their_position_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = GGUFWriter.add_kv_lora_rank
    monkeypatch.setattr(GGUFWriter, "add_kv_lora_rank", lambda self, n: (write(self, n), add_temperature(self)))
    gguf_files.write_gguf(tmp_path / "tiny.gguf", "deepseek_v3", make_model("deepseek_v3", LATENT))
    with pytest.raises(kvgen.UnsupportedError, match=r"deepseek2\.attention\.temperature_scale is 0\.5"):
        kvgen.load(tmp_path / "tiny.gguf", tokenizer="ids")


def add_temperature(writer: GGUFWriter) -> None:
    writer.add_attn_temperature_scale(0.5)


def test_the_first_layers_may_be_dense_by_number(tmp_path: Path) -> None:
    make_checkpoint("glm4_moe_lite", 0, tmp_path)
    expected = load(tmp_path).all_logits(IDS)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mlp_layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"first_k_dense_replace": 1}))
    assert torch.equal(load(tmp_path).all_logits(IDS), expected)


def test_it_cannot_be_converted(model: NativeBackend) -> None:
    with pytest.raises(kvgen.UnsupportedError, match="it has latent attention"):
        library_config(model.decoder.config)
