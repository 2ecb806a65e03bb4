"""Quantized Hugging Face folders: GPTQ, AWQ and compressed-tensors, on the kernels and on torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import kvgen
from kvgen import CheckpointError, UnsupportedError
from kvgen.backends.native import NativeBackend
from kvgen.checkpoint import read_checkpoint
from kvgen.loading.inspect import inspect
from tests.quantized_files import Form, config_of, make_quantized
from tests.test_checkpoint import edit_config, edit_tensors

IDS = torch.arange(40)[None] * 7 % 90

GPTQ = {
    "gptq": Form("gptq"),
    "gptq, asymmetric": Form("gptq", symmetric=False),
    "gptq, version 2": Form("gptq", symmetric=False, checkpoint_format="gptq_v2"),
    "gptq, version 2 under its new name": Form("gptq", checkpoint_format="gptq_v2").with_settings(format="gptq"),
    "gptq, one group": Form("gptq", group=None, checkpoint_format="gptq"),
    "gptq, 8 bits": Form("gptq", bits=8),
    "gptq, 8 bits, asymmetric": Form("gptq", bits=8, group=16, symmetric=False),
    "gptq, no index": Form("gptq", order="absent"),
    "gptq, unset index": Form("gptq", order="unset"),
    "gptq, small groups": Form("gptq", group=16, scales=torch.bfloat16),
}
AWQ = {
    "awq": Form("awq", symmetric=False),
    "awq, small groups": Form("awq", group=16, symmetric=False),
    "awq, one group": Form("awq", group=None, symmetric=False),
}
COMPRESSED = {
    "packed": Form("compressed-tensors", scales=torch.bfloat16),
    "packed, asymmetric": Form("compressed-tensors", symmetric=False),
    "packed, a group for each row": Form("compressed-tensors", group=None, scales=torch.float32),
    "packed, 8 bits": Form("compressed-tensors", bits=8, group=None),
    "packed, 8 bits, asymmetric": Form("compressed-tensors", bits=8, symmetric=False, scales=torch.bfloat16),
    "packed, unset index": Form("compressed-tensors", order="unset"),
    "bytes": Form("compressed-tensors", bits=8, group=None, format="int-quantized"),
    "bytes, asymmetric": Form("compressed-tensors", bits=8, symmetric=False, format="naive-quantized"),
}
GROUPED = GPTQ | AWQ | COMPRESSED
DENSE = {  # forms that the kernels have no codes for
    "gptq, act-order": Form("gptq", symmetric=False, order="shuffled"),
    "gptq, tiny groups": Form("gptq", group=8),
    "packed, act-order": Form("compressed-tensors", order="shuffled"),
}


def logits_of(folder: Path, **options: str) -> tuple[Tensor, NativeBackend]:
    model = kvgen.load(folder, tokenizer="ids", **options).model
    assert isinstance(model, NativeBackend)
    return model.all_logits(IDS), model


def reference_logits(reference: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = reference(IDS).logits
    return logits


@pytest.mark.parametrize("form", (GROUPED | DENSE).values(), ids=GROUPED | DENSE)
def test_stored_integers_stand_for_the_weights_of_the_formula(form: Form, tmp_path: Path) -> None:
    reference = make_quantized(tmp_path, form)
    read = 0
    tensors = read_checkpoint(tmp_path).tensors
    for name, expected in reference.named_parameters():
        if "_proj" not in name:
            continue
        tensor, grouped, read = tensors[name], tensors[name].read_grouped(), read + 1
        assert tensor.shape == expected.shape
        assert torch.equal(tensor.read(), expected)
        assert (grouped is None) == (form in DENSE.values())
        assert tensor.expands or grouped is not None
        if grouped is not None:
            assert grouped.bits == form.bits
            assert (grouped.dequantized() - expected).abs().max() < 1e-6
    assert read == 3 * 7


@pytest.mark.parametrize("form", (GROUPED | DENSE).values(), ids=GROUPED | DENSE)
def test_logits_are_those_of_the_dequantized_model(form: Form, tmp_path: Path) -> None:
    expected = reference_logits(make_quantized(tmp_path, form))
    on_torch, _ = logits_of(tmp_path, kernels="off")
    on_kernels, model = logits_of(tmp_path, kernels="cpp")
    plain, plain_model = logits_of(tmp_path, kernels="cpp", quantize="none")
    assert (on_torch - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() < 1e-4
    assert (on_kernels - expected).abs().max() < 1e-3 * expected.abs().max()
    # Codes, and for a group of 16 or 32 columns a scale and a minimum of up to 4 bytes; the embeddings are fp32.
    layers = sum(op.nbytes for name, op in model.decoder.weights.items() if name.startswith("blk."))
    floats = sum(op.nbytes for name, op in plain_model.decoder.weights.items() if name.startswith("blk."))
    most = 32 if form in DENSE.values() else form.bits + 64 / min(form.group or 32, 32)
    assert layers <= floats * (most + 0.3) / 32


@pytest.mark.parametrize("name", ["gptq", "awq", "packed", "bytes, asymmetric"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3", {"head_dim": 16}),
        ("phi3", {}),  # fused projections
        ("gpt_neox", {"rotary_pct": 0.25}),  # rows of queries, keys and values by head
        ("cohere", {}),  # interleaved rotation
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_are_reordered_and_split(kind: str, options: dict[str, Any], name: str, tmp_path: Path) -> None:
    expected = reference_logits(make_quantized(tmp_path, GROUPED[name], kind, **options))
    on_torch, _ = logits_of(tmp_path, kernels="off")
    on_kernels, model = logits_of(tmp_path, kernels="cpp")
    assert (on_torch - expected).abs().max() < 1e-4
    assert (on_kernels - expected).abs().max() < 1e-3 * expected.abs().max()
    weight = model.decoder.weights["blk.0.attn.q.weight"]
    assert weight.nbytes < weight.shape[0] * weight.shape[1] * (1 if GROUPED[name].bits == 4 else 1.6)


@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_need_not_fill_words(bits: int, tmp_path: Path) -> None:
    form = Form("compressed-tensors", bits, group=None, symmetric=False)
    expected = reference_logits(make_quantized(tmp_path, form, intermediate_size=53))
    assert (logits_of(tmp_path, kernels="off")[0] - expected).abs().max() < 1e-4
    assert (logits_of(tmp_path, kernels="cpp")[0] - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["gptq", "awq", "packed"])
def test_experts_are_stacked(name: str, tmp_path: Path) -> None:
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    expected = reference_logits(make_quantized(tmp_path, GROUPED[name], "qwen3_moe", **options))
    assert (logits_of(tmp_path, kernels="off")[0] - expected).abs().max() < 1e-4
    on_kernels, model = logits_of(tmp_path, kernels="cpp")
    assert (on_kernels - expected).abs().max() < 1e-3 * expected.abs().max()
    for part in ("gate", "up", "down"):
        weight = model.decoder.weights[f"blk.0.ffn.experts.{part}.weight"]
        assert weight.nbytes <= 6 / 8 * math.prod(weight.shape)


@pytest.mark.parametrize("name", COMPRESSED)
def test_transformers_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    """compressed-tensors dequantizes in the type of the scales, so their products must be exact in it."""
    form = replace(COMPRESSED[name], scales=torch.float32, order="")
    make_quantized(tmp_path, form, "qwen3", head_dim=16)
    config = config_of(form)
    config["config_groups"]["group_0"]["format"] = form.format  # else it supposes another one
    edit_config(tmp_path, quantization_config=config)
    options = {"dtype": torch.float32, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **options).eval()
    assert (logits_of(tmp_path, kernels="off")[0] - reference_logits(model)).abs().max() < 1e-4


def test_compressed_tensors_converts_awq_to_the_same_weights(tmp_path: Path) -> None:
    form = AWQ["awq"]
    make_quantized(tmp_path, form)
    stored = load_file(tmp_path / "model.safetensors")
    converter = AutoAWQConverter.from_autoawq_config(config_of(form))
    packed = Form("compressed-tensors", symmetric=False)
    expected = read_checkpoint(tmp_path).tensors
    save_file(converter.process(stored), tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config=config_of(packed))
    converted = read_checkpoint(tmp_path).tensors
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name].read(), tensor.read()) for name, tensor in expected.items())


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("format_name", ["naive-quantized", "float-quantized"])
def test_fp8_weights(strategy: str, format_name: str, tmp_path: Path) -> None:
    reference = make_quantized(tmp_path, COMPRESSED["bytes"].with_settings(format=format_name))
    edit_weights(tmp_path, num_bits=8, type="float", strategy=strategy)
    stored = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if f"{name}_scale" in stored:
                scales = torch.rand(parameter.shape[0] if strategy == "channel" else 1, 1) / 100 + 0.01
                stored[f"{name}_scale"] = scales.view(-1, 1) if strategy == "channel" else scales.view(1)
                stored[name] = (parameter / 0.01).to(torch.float8_e4m3fn)
                parameter.copy_(stored[name].float() * scales)
    save_file(stored, tmp_path / "model.safetensors")
    for kernels in ("cpp", "off"):
        assert (logits_of(tmp_path, kernels=kernels)[0] - reference_logits(reference)).abs().max() < 1e-4


def edit_weights(folder: Path, **changes: Any) -> None:
    """Change the weights of the only scheme in `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= changes
    edit_config(folder, quantization_config=config)


def test_each_matrix_has_the_scheme_that_fits_what_is_stored(tmp_path: Path) -> None:
    """Layers of 4 and of 8 bits, each format named by its group."""
    expected = reference_logits(make_quantized(tmp_path, COMPRESSED["packed"]))
    config = config_of(COMPRESSED["packed"])
    (group,) = config["config_groups"].values()
    others = [
        config_of(COMPRESSED[name])["config_groups"]["group_0"] | {"format": COMPRESSED[name].format}
        for name in ("packed, 8 bits, asymmetric", "bytes", "packed, asymmetric")
    ]
    groups = {f"group_{i}": scheme for i, scheme in enumerate([*others, group | {"format": "pack-quantized"}])}
    edit_config(tmp_path, quantization_config=config | {"config_groups": groups, "format": "mixed-precision"})
    assert (logits_of(tmp_path, kernels="off")[0] - expected).abs().max() < 1e-4


def test_half_precision_gets_rounded_weights(tmp_path: Path) -> None:
    reference = make_quantized(tmp_path, GPTQ["gptq, asymmetric"])
    model = kvgen.load(tmp_path, tokenizer="ids", dtype="bfloat16").model
    assert isinstance(model, NativeBackend)
    weight = model.module.state_dict()["blk.0.ffn.up.weight"]
    assert torch.equal(weight, reference.model.layers[0].mlp.up_proj.weight.bfloat16())


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq, 3 bits": ("gptq", {"bits": 3}, r"quantization_config.bits 3 is not supported \(kvgen reads: 4, 8\)"),
    "gptq, Marlin": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "gptq, Marlin by a flag": ("gptq", {"is_marlin_format": True}, "is_marlin_format.*Marlin"),
    "gptq, settings for some": ("gptq", {"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic"),
    "gptq, rotated": ("gptq", {"rotation": "hadamard"}, "rotation"),
    "gptq, adapter": ("gptq", {"adapter": {"name": "lora"}}, "adapter"),
    "gptq, other words": ("gptq", {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    "awq, gemv": ("awq", {"version": "gemv"}, "version 'gemv'"),
    "awq, llm-awq": ("awq", {"backend": "llm-awq"}, "version 'llm-awq' is not supported"),
    "awq, 3 bits": ("awq", {"bits": 3}, "bits 3"),
    "awq, no zeros": ("awq", {"zero_point": False}, "zero_point False"),
    "cache": ("packed", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme.*KV cache"),
    "transforms": ("packed", {"transform_config": {"config_groups": {}}}, "transform_config"),
    "sparse": ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format 'sparse-24"),
    "nvfp4": ("packed", {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    "another method": ("packed", {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
    "no method": ("packed", {"quant_method": None}, "quant_method None is not supported"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_variants_are_refused_by_name(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    form = GROUPED[name]
    make_quantized(tmp_path, form, num_hidden_layers=1)
    edit_config(tmp_path, quantization_config=config_of(form) | changes)
    with pytest.raises(UnsupportedError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 3}, "weights.num_bits 3"),
        ({"type": "float"}, "weights.type 'float'"),
        ({"strategy": "block"}, "weights.strategy 'block'"),
        ({"dynamic": True}, "weights.dynamic True"),
        ({"symmetric": "yes"}, "weights.symmetric 'yes'"),
    ],
    ids=str,
)
def test_schemes_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_quantized(tmp_path, COMPRESSED["packed"], num_hidden_layers=1)
    edit_weights(tmp_path, **changes)
    with pytest.raises(UnsupportedError, match=f"config_groups.group_0.{message} is not supported"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("what", ["input_activations", "output_activations"])
def test_quantized_activations_are_refused(what: str, tmp_path: Path) -> None:
    make_quantized(tmp_path, COMPRESSED["bytes"], num_hidden_layers=1)
    config = config_of(COMPRESSED["bytes"])
    config["config_groups"]["group_0"][what] = {"num_bits": 8, "dynamic": True}
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(UnsupportedError, match=f"{what} is set: quantization of activations is not supported"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"quantization_config is \[\]; it must be an object"),
        (config_of(GPTQ["gptq"]) | {"group_size": 0}, "group_size is 0"),
        (config_of(GPTQ["gptq"]) | {"group_size": "32"}, "group_size is '32'"),
        (config_of(GPTQ["gptq"]) | {"group_size": 40}, "96 columns, which do not divide into groups of 40"),
        (config_of(GPTQ["gptq"]) | {"group_size": 16}, r"scales' has the shape \(3, 64\), not \(6, 64\)"),
        (config_of(GPTQ["gptq"]) | {"bits": 8}, "48 columns, which do not divide into groups of 32"),
        (config_of(COMPRESSED["packed"]), "blk.0.attn.k.weight' .*is missing"),
        (config_of(COMPRESSED["packed"]) | {"config_groups": None}, "config_groups is None"),
        (config_of(COMPRESSED["packed"]) | {"config_groups": {"a": 3}}, "config_groups.a is 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_fit_are_errors(value: Any, message: str, tmp_path: Path) -> None:
    make_quantized(tmp_path, GPTQ["gptq"], num_hidden_layers=1)
    edit_config(tmp_path, quantization_config=value)
    with pytest.raises(CheckpointError, match=message):
        kvgen.load(tmp_path, tokenizer="ids")


UP = "model.layers.0.mlp.up_proj"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "a part is missing": ("gptq", lambda t: t.pop(f"{UP}.scales"), "up_proj.scales' is missing"),
    "all but the scales": ("gptq", lambda t: t.pop(f"{UP}.qweight"), "blk.0.ffn.up.weight' is missing"),
    "plain and quantized": ("gptq", lambda t: t.update({f"{UP}.weight": torch.ones(96, 64)}), "beside its quantized"),
    "words of a wrong type": (
        "awq",
        lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}),
        "has the type F32, not I32",
    ),
    "no matrix": ("awq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].flatten()}), "must be a matrix"),
    "empty": ("awq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:0]}), "must be a matrix"),
    "integer scales": ("awq", lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()}), "not F16 or BF16 or F32"),
    "short zeros": (
        "awq",
        lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:1].clone()}),
        "qzeros' has the shape",
    ),
    "a short index": ("gptq", lambda t: t.update({f"{UP}.g_idx": torch.zeros(3).int()}), r"g_idx' has the shape \(3,"),
    "groups that do not exist": (
        "gptq",
        lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"] + 1}),
        "g_idx' names groups from 1 to 2, but there are 2",
    ),
    "another shape": ("packed", lambda t: t.update({f"{UP}.weight_shape": torch.tensor([95, 64])}), "says 95 rows"),
    "too many columns": (
        "packed",
        lambda t: t.update({f"{UP}.weight_shape": torch.tensor([96, 2**62])}),
        "fits no scheme in config_groups",
    ),
    "negative columns": (
        "packed",
        lambda t: t.update({f"{UP}.weight_shape": torch.tensor([96, -64])}),
        "fits no scheme in config_groups",
    ),
    "zeros of a symmetric scheme": (
        "packed",
        lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(12, 2).int()}),
        "fits no scheme in config_groups",
    ),
    "bytes in a packed checkpoint": (
        "packed",
        lambda t: t.update({f"{UP}.weight": t.pop(f"{UP}.weight_packed").view(torch.int8)}),
        "fits no scheme|weight_shape' is not part of",
    ),
    "no scale": ("bytes", lambda t: t.pop(f"{UP}.weight_scale"), "has the type I8"),
    "no scale of FP8": (
        "bytes",
        lambda t: t.update(
            {f"{UP}.weight": t[f"{UP}.weight"].float().to(torch.float8_e4m3fn), "x": t.pop(f"{UP}.weight_scale")}
        ),
        "up_proj.weight' is quantized, but has no weight_scale",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit_are_errors_that_name_them(
    name: str, damage: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    make_quantized(tmp_path, GROUPED[name], num_hidden_layers=1)
    edit_tensors(tmp_path, damage)
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        kvgen.load(tmp_path, tokenizer="ids")


def test_inspect_shows_the_stored_form(tmp_path: Path) -> None:
    for name, kind in [("gptq, 8 bits", "GPTQ 8-bit"), ("awq", "AWQ 4-bit"), ("packed", "pack-quantized 4-bit")]:
        reference = make_quantized(tmp_path / name, GROUPED[name])
        found = inspect(tmp_path / name)
        assert found.backend == "native"
        assert kind in found.types
        assert found.parameters == sum(parameter.numel() for parameter in reference.parameters())
