"""MXFP4 in GGUF files and in Hugging Face folders, against gguf's own arithmetic and transformers'."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import kvgen
from kvgen.checkpoint import read_checkpoint
from kvgen.checkpoint.quantization.mxfp4 import dequantize
from kvgen.loading.inspect import inspect
from tests.families import BETWEEN_PAIRS, make_model
from tests.gguf_experts import is_expert
from tests.gguf_files import write_gguf

SIZES = BETWEEN_PAIRS | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 9}
SIZES |= {"hidden_size": 64, "intermediate_size": 32}
IDS = torch.arange(2, 42)[None]
Tensors = dict[str, Tensor]


def random_bytes(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_folders(root: Path, sizes: dict[str, Any]) -> Any:
    """Write a model whose experts are random MXFP4 numbers, as such and in floating point; return it."""
    model, packed = make_model("gpt_oss", sizes, seed=3), {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = parameter.shape
            blocks = random_bytes(experts, rows, columns // 32, 16, seed=len(packed))
            scales = random_bytes(experts, rows, columns // 32, seed=len(packed) + 1, low=121, high=126)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for folder in (root / "floats", root / "packed"):
        model.save_pretrained(folder)

    def pack(tensors: Tensors) -> None:
        for name in packed:
            tensors.pop(name.removesuffix("_scales"), None)
        tensors |= packed

    rewrite(root / "packed", pack)
    config = json.loads((root / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (root / "packed" / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("halves", [True, False])
def test_every_pair_of_codes_with_every_exponent_is_exact(halves: bool) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(253, 1)
    exponents = torch.arange(253, dtype=torch.uint8).repeat_interleave(16)  # above, float32 lacks 6 times as much
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=1 if halves else 2).flatten(1)
    expected = values[codes.long()] * 2.0 ** (exponents.double()[:, None] - 127)
    assert torch.equal(dequantize(blocks, exponents, halves=halves).double(), expected)


def test_numbers_equal_transformers() -> None:
    blocks, scales = random_bytes(3, 40, 600, 16), random_bytes(3, 40, 600, low=1, high=250)  # more than one chunk
    numbers = dequantize(blocks.view(-1, 16), scales.flatten(), halves=False)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(numbers.view(3, 40, -1).transpose(1, 2), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_in_mxfp4_gives_the_logits_of_its_numbers(dtype: str, tmp_path: Path) -> None:
    model = write_folders(tmp_path, SIZES)
    packed, floats = (
        kvgen.load(tmp_path / name, tokenizer="ids", dtype=dtype, kernels="off").model for name in ("packed", "floats")
    )
    actual = packed.all_logits(IDS)
    assert torch.equal(actual, floats.all_logits(IDS))
    if dtype == "float32":
        with torch.inference_mode():
            assert (actual - model(IDS, use_cache=False).logits).abs().max() < 1e-4


def test_a_gguf_file_in_mxfp4_gives_the_same_logits(tmp_path: Path) -> None:
    model = write_folders(tmp_path, SIZES)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "gpt_oss", model, type_=gguf.GGMLQuantizationType.MXFP4, quantized=is_expert)
    experts = {name: tensor for name, tensor in read_checkpoint(path).tensors.items() if "_exps.weight" in name}
    assert len(experts) == 9
    assert {(tensor.type, tensor.read().dtype, len(tensor.shape)) for tensor in experts.values()} == {
        ("MXFP4", torch.bfloat16, 3)
    }
    actual = kvgen.load(path, tokenizer="ids", kernels="off").model.all_logits(IDS)
    folder = kvgen.load(tmp_path / "packed", tokenizer="ids", kernels="off").model
    assert torch.equal(actual, folder.all_logits(IDS))


@pytest.mark.parametrize("name", ["packed", "tiny.gguf"])
def test_experts_stay_as_small_on_the_kernels(name: str, tmp_path: Path) -> None:
    model = write_folders(tmp_path, SIZES)
    write_gguf(tmp_path / "tiny.gguf", "gpt_oss", model, type_=gguf.GGMLQuantizationType.MXFP4, quantized=is_expert)
    packed, on_torch = (
        kvgen.load(tmp_path / name, tokenizer="ids", kernels=kernels).model for kernels in ("cpp", "off")
    )
    for parameter, weight in packed.decoder.weights.items():
        if parameter.endswith(("experts.gate.weight", "experts.up.weight", "experts.down.weight")):
            assert weight.nbytes == 4.5 / 8 * math.prod(weight.shape)
    expected = on_torch.all_logits(IDS)
    # Activations have 16 bits in each group, which may change the choice of experts at a few positions.
    assert (packed.all_logits(IDS) - expected).abs().amax(-1).median() < 1e-3 * expected.abs().max()


def test_inspect_counts_numbers_and_names_the_type(tmp_path: Path) -> None:
    model = write_folders(tmp_path, SIZES)
    packed, floats = inspect(tmp_path / "packed"), inspect(tmp_path / "floats")
    assert packed.parameters == floats.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert packed.types["MXFP4"] == 17 * 3 * 3 * (64 * 64 + 32 * 64) // 32
    assert packed.mechanisms == floats.mechanisms
    assert packed.mechanisms["attention"] == "4 heads of size 8, 2 key-value heads, sinks"
    assert "clamped swiglu, gated, width 32" in packed.mechanisms["experts"]


NAME = "model.layers.1.mlp.experts.down_proj"
DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no scales": (lambda tensors: tensors.pop(f"{NAME}_scales"), "down_proj_scales' is missing"),
    "no blocks": (lambda tensors: tensors.pop(f"{NAME}_blocks"), "down_proj_blocks' is missing"),
    "other scales": (
        lambda tensors: tensors.update({f"{NAME}_scales": random_bytes(3, 64, 2)}),
        r"down_proj_scales' has the shape \(3, 64, 2\), not \(3, 64, 1\)",
    ),
    "scales as numbers": (
        lambda tensors: tensors.update({f"{NAME}_scales": torch.ones(3, 64, 1)}),
        "down_proj_scales' has the type F32, not U8",
    ),
    "blocks of 8 bytes": (
        lambda tensors: tensors.update({f"{NAME}_blocks": random_bytes(3, 64, 1, 8)}),
        r"down_proj_blocks' has the shape \(3, 64, 1, 8\); it must be",
    ),
    "fewer rows": (
        lambda tensors: tensors.update(
            {f"{NAME}_blocks": random_bytes(3, 60, 1, 16), f"{NAME}_scales": random_bytes(3, 60, 1)}
        ),
        r"down_proj' has the shape \(3, 60, 32\), not \(3, 64, 32\)",
    ),
    "both forms": (lambda tensors: tensors.update({NAME: torch.ones(3, 32, 64)}), "down_proj' is stored beside"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    write_folders(tmp_path, SIZES)
    change, message = DAMAGES[name]
    rewrite(tmp_path / "packed", change)
    with pytest.raises(kvgen.CheckpointError, match=message):
        kvgen.load(tmp_path / "packed", tokenizer="ids")


@pytest.mark.slow
def test_reading_takes_little_more_memory_than_the_result(tmp_path: Path) -> None:
    large = {"hidden_size": 512, "intermediate_size": 384, "num_local_experts": 16, "num_hidden_layers": 12}
    write_folders(tmp_path / "small", SIZES)
    write_folders(tmp_path / "large", SIZES | large)
    script = f"""
import kvgen, resource, os
os.cpu_count = lambda: 2
for size in ("small", "large"):
    loaded = kvgen.load({str(tmp_path)!r} + f"/{{size}}/packed", tokenizer="ids", dtype="bfloat16")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, loaded.model.weight_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, _, peak, result = map(int, done.stdout.split())
    assert peak - before < 1.3 * result
