"""Layers that read the keys and values of earlier ones: they keep nothing, in memory or in a prompt cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvgen
from kvgen import CheckpointError
from kvgen.backends.native import NativeBackend
from kvgen.checkpoint import read_checkpoint
from kvgen.families import find_family
from kvgen.generation.prompt_cache import load_prompt_cache, save_prompt_cache
from kvgen.loading.inspect import inspect
from kvgen.loading.load import load
from kvgen.model.mixers import SharedAttention
from tests.families import make_checkpoint

IDS = torch.randint(2, 96, (1, 60), generator=torch.Generator().manual_seed(1))


def load_gemma(folder: Path, kind: str = "gemma4_text", **options: Any) -> NativeBackend:
    make_checkpoint(kind, 0, folder)
    model = load(folder, tokenizer="ids", **options).model
    assert isinstance(model, NativeBackend)
    return model


@pytest.mark.parametrize(("kind", "kept"), [("gemma4_text", 3), ("gemma3n_text", 3)])
def test_a_cache_has_no_state_for_a_layer_that_keeps_nothing(kind: str, kept: int, tmp_path: Path) -> None:
    model = load_gemma(tmp_path, kind)
    _, cache = model(IDS)
    mixers = [layer.mixer for layer in model.decoder.config.layers]
    assert [isinstance(mixer, SharedAttention) for mixer in mixers] == [False] * kept + [True] * (5 - kept)
    assert len(cache.states) == len(cache.held()) == kept
    assert model.cache_bytes(IDS.shape[1]) >= cache.nbytes_held > 0


def test_shared_layers_read_the_last_layer_of_their_kind(tmp_path: Path) -> None:
    layers = load_gemma(tmp_path, "gemma3n_text").decoder.config.layers
    assert [getattr(layer.mixer, "window", -1) for layer in layers] == [9, None, 9, None, 9]
    assert [layer.mixer.state for layer in layers if isinstance(layer.mixer, SharedAttention)] == [1, 2]


def test_int8_keys_are_read_again_as_they_are_stored(tmp_path: Path) -> None:
    model = load_gemma(tmp_path, kv_dtype="int8")
    cache = None
    for length in (30, 31, 33, 60, 45):
        cached, cache = model(IDS[:, :length], cache)
        uncached, _ = model(IDS[:, :length], None)
        assert (cached - uncached).abs().max() < 0.2


def test_a_prompt_cache_comes_back(tmp_path: Path) -> None:
    make_checkpoint("gemma4_text", 0, tmp_path)
    loaded = kvgen.load(tmp_path, tokenizer="ids")
    _, cache = loaded.model(IDS)
    save_prompt_cache(tmp_path / "prompt.cache", cache, loaded)
    restored = load_prompt_cache(tmp_path / "prompt.cache", loaded)
    longer = torch.cat((IDS, IDS[:, :3]), dim=1)
    again, cache = loaded.model(longer, restored)
    assert cache.reused == IDS.shape[1]
    assert (again - loaded.model(longer)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_keys_of_layers_that_read_those_of_others_are_left_out(kind: str, tmp_path: Path) -> None:
    """Published checkpoints hold them, and transformers ignores them."""
    expected = load_gemma(tmp_path, kind)(IDS)[0]
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for part in ("k_proj", "v_proj", "k_norm"):
        tensors[f"model.layers.4.self_attn.{part}.weight"] = tensors[f"model.layers.0.self_attn.{part}.weight"] + 1
    save_file(tensors, path, {"format": "pt"})
    assert torch.equal(load(tmp_path, tokenizer="ids").model(IDS)[0], expected)
    tensors["model.layers.9.self_attn.k_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.9\.self_attn\.k_proj\.weight' is not part"):
        load(tmp_path, tokenizer="ids")


def test_a_layer_without_an_earlier_one_of_its_kind_is_refused(tmp_path: Path) -> None:
    make_checkpoint("gemma4_text", 0, tmp_path)
    raw = read_checkpoint(tmp_path)
    raw = raw.with_metadata({"num_kv_shared_layers": 5})
    with pytest.raises(CheckpointError, match="layer 0 shares the keys of an earlier one, but none is of its kind"):
        find_family(raw).config(raw)


def test_inspect_describes_every_part(tmp_path: Path) -> None:
    make_checkpoint("gemma3n_text", 0, tmp_path / "3n")
    make_checkpoint("gemma4_text", 2, tmp_path / "4")
    make_checkpoint("gemma4_text", 1, tmp_path / "experts")
    words = inspect(tmp_path / "3n").mechanisms
    assert words["residual"] == "4 streams (AltUp), LAuReL of rank 7, 6 inputs of each layer, by token"
    assert "4 heads of size 12, with keys and values of an earlier layer, in 2 of 5 layers" in words["attention"]
    assert "gates above 1.28 standard deviations, in 1 of 5 layers" in words["MLP"]
    assert words["windows"] == "9 in 3 of 5 layers"
    words = inspect(tmp_path / "4").mechanisms
    assert "4 heads of size 12, 1 key-value heads, values normalized, keys as values" in words["attention"]
    assert "rotary on 2 of 12 dimensions" in words["positions"]
    assert "2 of 6" in inspect(tmp_path / "experts").mechanisms["experts"]
    lacking = inspect(tmp_path / "3n").kernels_lack or ""
    assert "keys and values shared between layers" in lacking and "altup" in lacking
