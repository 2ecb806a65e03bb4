"""FP8 checkpoints: what is computed equals that of the plain weights, and what does not fit is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kvgen
from kvgen.checkpoint import read_checkpoint
from kvgen.loading.inspect import inspect
from tests.families import make_checkpoint

IDS = torch.arange(2, 42)[None]
BLOCK = [16, 20]  # neither divides the sizes of all matrices
UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def fp8(weight: Tensor, block: list[int] | None) -> tuple[Tensor, Tensor]:
    """Return a weight as FP8 and its scales, those of blocks one by one."""
    if block is None:
        scale = weight.abs().max() / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    rows, columns = weight.shape
    scales = torch.empty(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def plain(codes: Tensor, scales: Tensor, block: list[int] | None) -> Tensor:
    """w[r, c] = code[r, c] * scale[r // block rows, c // block columns], number by number."""
    if block is None:
        return codes.float() * scales
    return torch.tensor(
        [
            [float(code) * float(scales[r // block[0], c // block[1]]) for c, code in enumerate(row)]
            for r, row in enumerate(codes)
        ]
    )


def make(kind: str, folder: Path, *, block: list[int] | None = BLOCK, scale: str = "_scale_inv") -> None:
    """Write a model in FP8 into `folder`, and one of the same numbers in fp32 beside it."""
    make_checkpoint(kind, 0, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    stored, numbers = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):  # as these checkpoints have it: no norm, embedding, router or head
            stored[name] = numbers[name] = tensor
            continue
        codes, scales = fp8(tensor, block)
        stored |= {name: codes, name + scale: scales}
        numbers[name] = plain(codes, scales, block)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    write(folder, config | {"quantization_config": settings}, stored)
    write(folder / "plain", config, numbers)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def logits(folder: Path) -> Tensor:
    return kvgen.load(folder, tokenizer="ids").model.all_logits(IDS)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "qwen3_moe"])
def test_blocks_with_scales_are_the_weights(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    assert torch.equal(logits(tmp_path), logits(tmp_path / "plain"))


@pytest.mark.parametrize("scale", ["_scale_inv", "_scale"])
def test_a_scale_for_a_whole_matrix(scale: str, tmp_path: Path) -> None:
    make("llama", tmp_path, block=None, scale=scale)
    assert torch.equal(logits(tmp_path), logits(tmp_path / "plain"))


@pytest.mark.parametrize("block", [[1, 1], [7, 48], [64, 64], [10**15, 10**15]], ids=str)
def test_blocks_of_any_size(block: list[int], tmp_path: Path) -> None:
    make("llama", tmp_path, block=block)
    weights = [read_checkpoint(folder).tensors[UP].read() for folder in (tmp_path, tmp_path / "plain")]
    assert weights[0].dtype == torch.float32
    assert torch.equal(*weights)


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    make("llama", tmp_path, block=None)
    change(tmp_path, lambda tensors: tensors.update({UP.replace("weight", "activation_scale"): torch.ones(())}))
    with pytest.raises(kvgen.CheckpointError, match="activation_scale"):
        logits(tmp_path)
    set_option(tmp_path, "activation_scheme", "static")
    assert torch.equal(logits(tmp_path), logits(tmp_path / "plain"))


def test_layers_that_predict_further_tokens_are_ignored(tmp_path: Path) -> None:
    make("deepseek_v3", tmp_path)
    further = {EXPERT.replace("layers.1", "layers.3"): torch.ones(20, 32).to(torch.float8_e4m3fn)}
    further |= {f"{name}_scale_inv": torch.ones(2, 2) for name in further}
    change(tmp_path, lambda tensors: tensors.update(further))
    assert torch.equal(logits(tmp_path), logits(tmp_path / "plain"))


def test_inspect_counts_weights_and_not_scales(tmp_path: Path) -> None:
    make("deepseek_v3", tmp_path)
    found, expected = inspect(tmp_path), inspect(tmp_path / "plain")
    assert (found.parameters, found.obstacle) == (expected.parameters, "")
    assert found.types["FP8 in blocks of 16 x 20"] > found.types["F32"]


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_option(folder: Path, name: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][name] = value
    (folder / "config.json").write_text(json.dumps(config))


EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scale": (lambda t: t.pop(f"{UP}_scale_inv"), f"{UP}_scale_inv' is missing"),
    "no weight": (lambda t: t.pop(UP), f"{UP}_scale_inv' scales a tensor that is not"),
    "two scales": (lambda t: t.update({f"{UP}_scale": torch.ones(3, 2)}), f"is stored beside {UP}_scale"),
    "scale of a block less": (
        lambda t: t.update({f"{UP}_scale_inv": torch.ones(3, 1)}),
        f"{UP}_scale_inv' has the shape (3, 1), not (3, 2)",
    ),
    "scale for all": (lambda t: t.update({f"{UP}_scale_inv": torch.ones(())}), "has the shape (), not (3, 2)"),
    "integer scale": (lambda t: t.update({f"{UP}_scale_inv": torch.ones(3, 2).long()}), "has the type I64, not F16"),
    "vector": (
        lambda t: t.update({UP: torch.ones(48).to(torch.float8_e4m3fn)}),
        f"{UP}' has the shape (48,); it must be a matrix",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make("llama", tmp_path)
    edit, message = EDITS[name]
    change(tmp_path, edit)
    with pytest.raises(kvgen.CheckpointError, match=re.escape(message)):
        kvgen.load(tmp_path, tokenizer="ids")


@pytest.mark.parametrize("value", [[128], [0, 128], [128, "x"], 128, [True, 1]], ids=str)
def test_impossible_blocks_are_refused(value: Any, tmp_path: Path) -> None:
    make("llama", tmp_path)
    set_option(tmp_path, "weight_block_size", value)
    with pytest.raises(kvgen.CheckpointError, match="weight_block_size"):
        kvgen.load(tmp_path, tokenizer="ids")


@pytest.mark.parametrize(("name", "value"), [("fmt", "e5m2"), ("activation_scheme", "other")])
def test_other_variants_are_refused(name: str, value: str, tmp_path: Path) -> None:
    make("llama", tmp_path)
    set_option(tmp_path, name, value)
    with pytest.raises(kvgen.UnsupportedError, match=f"{name} {value!r} is not supported"):
        kvgen.load(tmp_path, tokenizer="ids")


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    make("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    del config["quantization_config"]
    write(tmp_path, config, {name: tensor for name, tensor in tensors.items() if "_scale" not in name})
    with pytest.raises(kvgen.UnsupportedError, match="has the type F8_E4M3"):
        kvgen.load(tmp_path, tokenizer="ids")
