"""Folders and files that do not fit: one clear error each, and the tensor rules that hold for both formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvgen
from kvgen import CheckpointError, KvgenError, NotFoundError, UnsupportedError, UsageError
from kvgen.families.llama import split_halves
from tests.families import LINEAR, LLAMA3, YARN, make_checkpoint
from tests.gguf_files import interleave, write_gguf


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    path.write_text(json.dumps(config))


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model_type": "mamba"}, UnsupportedError, "model_type 'mamba'"),
        ({"model_type": ...}, CheckpointError, "model_type is missing"),
        ({"hidden_act": "tanh"}, UnsupportedError, "hidden_act 'tanh' is not supported"),
        ({"hidden_size": ...}, CheckpointError, "hidden_size is missing"),
        ({"hidden_size": "32"}, CheckpointError, "hidden_size is '32'"),
        ({"num_hidden_layers": 0}, CheckpointError, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, CheckpointError, "num_hidden_layers is True"),
        ({"rms_norm_eps": -1}, CheckpointError, "rms_norm_eps is -1"),
        ({"num_key_value_heads": 3}, CheckpointError, "cannot share 3"),
        ({"head_dim": 7}, CheckpointError, "need an even number of dimensions, but the config rotates 7 of the 7"),
        ({"sliding_window": 128}, UnsupportedError, "sliding_window is 128"),
        ({"quantization_config": {"quant_method": "aqlm"}}, UnsupportedError, "quant_method 'aqlm'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedError, "cannot be cached"),
        ({"rope_parameters": {"rope_type": "longrope"}}, CheckpointError, "short_factor must be a list"),
        ({"rope_parameters": {"rope_type": "linear"}}, CheckpointError, "factor is missing"),
        ({"rope_parameters": 3}, CheckpointError, "rope_parameters is 3"),
        ({"rope_parameters": LONGROPE | {"original_max_position_embeddings": 1}}, CheckpointError, "impossible values"),
        ({"rope_parameters": YARN["rope_parameters"] | {"beta_fast": 1e308}}, CheckpointError, "impossible values"),
        ({"tie_word_embeddings": True}, CheckpointError, "not a copy of the embedding"),
        ({"intermediate_size": 40}, CheckpointError, "shape"),
        ({"num_hidden_layers": 4}, CheckpointError, r"blk\.3.*missing"),
        ({"num_hidden_layers": 2}, CheckpointError, "layers.2.*not part of"),
        ({"attention_bias": True}, CheckpointError, "bias.*missing"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused_by_name(tiny_llama, changes, kind, message: str) -> None:
    folder, _ = tiny_llama()
    edit_config(folder, **changes)
    with pytest.raises(kind, match=message) as caught:
        kvgen.load(folder)
    assert str(folder) in str(caught.value)


def test_old_configs_read_like_new_ones(tiny_llama) -> None:
    """Before version 5 transformers wrote rope_theta and rope_scaling, with `type` for `rope_type`."""
    scaling = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    folder, reference = tiny_llama(rope_parameters=scaling)
    edit_config(folder, rope_parameters=..., rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        expected = reference(ids).logits
    assert (kvgen.load(folder).model.all_logits(ids) - expected).abs().max() < 1e-4


def test_missing_unknown_and_misshapen_tensors_are_refused(tiny_llama) -> None:
    folder, _ = tiny_llama()
    edit_tensors(folder, lambda tensors: tensors.__delitem__("model.norm.weight"))
    with pytest.raises(CheckpointError, match="output_norm.weight.*missing"):
        kvgen.load(folder)
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32), "x": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="'x' is not part of"):
        kvgen.load(folder)


def test_a_tensor_of_other_heads_is_named_with_its_shape(tmp_path: Path) -> None:
    make_checkpoint("phi3", 1, tmp_path)
    edit_config(tmp_path, num_key_value_heads=4)
    problem = r"qkv_proj.weight' has the shape \(48, 32\), which does not divide into \(32, 32\), \(32, 32\),"
    for kernels in ("off", "auto"):
        with pytest.raises(CheckpointError, match=problem):
            kvgen.load(tmp_path, kernels=kernels, tokenizer="ids")


def test_biases_count_where_the_tensors_are_there(tiny_llama) -> None:
    folder, reference = tiny_llama(attention_bias=True)
    edit_config(folder, attention_bias=False)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        expected = reference(ids).logits
    assert (kvgen.load(folder).model.all_logits(ids) - expected).abs().max() < 1e-4


def test_a_tied_head_that_is_stored_all_the_same_is_read(tiny_llama) -> None:
    folder, reference = tiny_llama(tie_word_embeddings=True)
    copy = reference.model.embed_tokens.weight.detach().clone()
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": copy}))
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        expected = reference(ids).logits
    assert (kvgen.load(folder).model.all_logits(ids) - expected).abs().max() < 1e-4


def test_integer_weights_are_refused(tiny_llama) -> None:
    folder, _ = tiny_llama()
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UnsupportedError, match="I8"):
        kvgen.load(folder)


def damage_folder(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "config is a list":
        (folder / "config.json").write_text("[]")
    elif how == "deep JSON":
        (folder / "config.json").write_text("[" * 100_000)
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "weights are text":
        weights.write_text("hello")
    elif how == "huge header":
        weights.write_bytes(b"\xff" * 8 + b"{}")
    elif how == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "missing shard":
        index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    elif how == "shard outside":
        index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    elif how == "index without map":
        index.write_text("{}")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "no config.json"),
        ("config is no JSON", "not valid JSON"),
        ("config is a list", "JSON object"),
        ("deep JSON", "not valid JSON"),
        ("cut weights", "safetensors"),
        ("weights are text", "safetensors"),
        ("huge header", "safetensors"),
        ("pickle only", "pickle"),
        ("missing shard", "missing; download"),
        ("shard outside", "outside the folder"),
        ("index without map", "weight_map"),
    ],
)
def test_damaged_folders_give_one_clear_error(tiny_llama, how: str, message: str) -> None:
    folder, _ = tiny_llama()
    damage_folder(folder, how)
    with pytest.raises(KvgenError, match=message) as caught:
        kvgen.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# --- GGUF --------------------------------------------------------------------------------------------------------


def test_split_halves_undoes_the_converters_order() -> None:
    rows = torch.randn(24, 5)
    joined = torch.from_numpy(interleave(rows.numpy(), 3))
    assert not torch.equal(joined, rows)
    assert torch.equal(split_halves(joined, 3), rows)
    assert torch.equal(split_halves(joined[:, 0], 3), rows[:, 0])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 12},
        {"attention_bias": True, "mlp_bias": True},
        LLAMA3 | {"head_dim": 64},
        LINEAR,
        YARN | {"head_dim": 32},
    ],
    ids=["plain", "tied", "head-size", "biases", "llama3", "linear", "yarn"],
)
def test_a_gguf_file_gives_the_logits_of_the_model_it_came_from(
    tiny_llama, tiny_tokenizer, tmp_path: Path, config: dict[str, Any]
) -> None:
    _, reference = tiny_llama(**config)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", reference, tokenizer=tiny_tokenizer)
    ids = torch.randint(0, 384, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids).logits
    loaded = kvgen.load(path)
    assert (loaded.model.all_logits(ids) - expected).abs().max() < 1e-4
    assert loaded.tokenizer.encode("Hello, world! 123") == tiny_tokenizer.encode("Hello, world! 123").ids


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8, "expert_gating_func": 9}, "expert_gating_func"),
        ({"attention.value_length": 4}, "value_length"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4, "rope.scaling.yarn_attn_factor": 2}, "attn_factor"),
    ],
    ids=str,
)
def test_gguf_mechanisms_that_kvgen_lacks_are_refused(
    tiny_llama, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    _, reference = tiny_llama()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", reference, keys=keys)
    with pytest.raises(UnsupportedError, match=message):
        kvgen.load(path)


# --- Devices and dtypes ------------------------------------------------------------------------------------------


def test_dtype_and_device_are_what_was_asked_for(tiny_llama) -> None:
    folder, _ = tiny_llama()
    assert kvgen.load(folder).model.dtype == torch.float32
    loaded = kvgen.load(folder, dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in loaded.model.module.parameters()} == {torch.bfloat16}
    with pytest.raises(UsageError, match="dtype 'int3'"):
        kvgen.load(folder, dtype="int3")
    with pytest.raises(UsageError, match="device 'toaster'"):
        kvgen.load(folder, device="toaster")


def test_nothing_trains(tiny_llama) -> None:
    model = kvgen.load(tiny_llama()[0], kernels="off").model.module
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_path_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="not a file or folder"):
        kvgen.load(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UnsupportedError, match="not a GGUF file"):
        kvgen.load(tmp_path / "text.gguf")
