"""Tiny checkpoints of random integers in the quantized forms of Hugging Face folders, written by their definitions.

The weights follow from the integers before they are packed, so that nothing that unpacks is needed to know them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import make_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs each nibble of a word holds, lowest first


@dataclass(frozen=True)
class Form:
    """How matrices are stored. group: columns that share a scale; None for all."""

    method: str
    bits: int = 4
    group: int | None = 32
    symmetric: bool = True
    format: str = "pack-quantized"
    checkpoint_format: str | None = None
    order: str = ""  # of columns: shuffled, unset, absent; "" for groups of adjacent columns
    scales: torch.dtype = torch.float16
    settings: dict[str, Any] = field(default_factory=dict)

    def with_settings(self, **settings: Any) -> Form:
        return replace(self, settings=self.settings | settings)


@dataclass(frozen=True)
class Matrix:
    """weight[r, k] = (codes[r, k] - zeros[r, g]) * scales[r, g], with g = index[k]. codes from 0, zeros likewise."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: Tensor
    index: np.ndarray

    def weights(self) -> Tensor:
        difference = torch.from_numpy(self.codes - self.zeros[:, self.index]).float()
        return difference * self.scales.float()[:, self.index]


def draw(rows: int, columns: int, form: Form, random: np.random.Generator) -> Matrix:
    group = form.group or columns
    groups, top = columns // group, 2**form.bits
    codes = random.integers(0, top, (rows, columns))
    zeros = np.full((rows, groups), top // 2)
    if not form.symmetric:
        zeros += random.integers(-top // 4, top // 4, zeros.shape)
        zeros[0, 0], zeros[-1, -1] = 0, top - 1
    scales = torch.from_numpy(random.uniform(0.5, 1, (rows, groups)) / top).to(form.scales)
    index = np.arange(columns) // group
    return Matrix(codes, zeros, scales, random.permutation(index) if form.order == "shuffled" else index)


def pack(codes: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """Pack (n, m) codes along m to uint32, the first in the lowest bits; `order`: another order within a word."""
    per_word = 32 // bits
    order = order or list(range(per_word))
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    words = np.zeros((len(codes), padded.shape[1] // per_word), np.uint32)
    for place, code in enumerate(order):
        words |= padded[:, code::per_word].astype(np.uint32) << np.uint32(bits * place)
    return words


def words(packed: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


def parts_of(matrix: Matrix, form: Form) -> dict[str, Tensor]:
    """The tensors that store a matrix, by the last parts of their names."""
    return {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[form.method](matrix, form)


def _indices(matrix: Matrix, form: Form, unset: int) -> Tensor:
    index = torch.from_numpy(matrix.index).int()
    return torch.full_like(index, unset) if form.order == "unset" else index


def _gptq(matrix: Matrix, form: Form) -> dict[str, Tensor]:
    zeros = pack(matrix.zeros.T, form.bits)
    if form.checkpoint_format != "gptq_v2":  # GPTQModel's conversion to the first version
        zeros = zeros - np.uint32(0x11111111 if form.bits == 4 else 0x01010101)
    parts = {
        "qweight": words(pack(matrix.codes, form.bits).T),
        "qzeros": words(zeros),
        "scales": matrix.scales.T.contiguous(),
        "g_idx": _indices(matrix, form, 0),
    }
    return {name: tensor for name, tensor in parts.items() if (name, form.order) != ("g_idx", "absent")}


def _awq(matrix: Matrix, form: Form) -> dict[str, Tensor]:
    return {
        "qweight": words(pack(matrix.codes.T, 4, AWQ_ORDER)),
        "qzeros": words(pack(matrix.zeros.T, 4, AWQ_ORDER)),
        "scales": matrix.scales.T.contiguous(),
    }


def _compressed(matrix: Matrix, form: Form) -> dict[str, Tensor]:
    parts = {"weight_scale": matrix.scales}
    if form.format == "pack-quantized":
        parts["weight_packed"] = words(pack(matrix.codes, form.bits))
        parts["weight_shape"] = torch.tensor(matrix.codes.shape)
        if not form.symmetric:
            parts["weight_zero_point"] = words(pack(matrix.zeros.T, form.bits).T)
    else:
        parts["weight"] = torch.from_numpy(matrix.codes - 128).to(torch.int8)
        if not form.symmetric:
            parts["weight_zero_point"] = torch.from_numpy(matrix.zeros - 128).to(torch.int8)
    if form.order:
        parts["weight_g_idx"] = _indices(matrix, form, -1)
    return parts


def config_of(form: Form) -> dict[str, Any]:
    """`quantization_config`, as the tools write it."""
    size = form.group or -1
    if form.method == "compressed-tensors":
        weights = {
            "num_bits": form.bits,
            "type": "int",
            "symmetric": form.symmetric,
            "strategy": "channel" if form.group is None else "group",
            "group_size": form.group,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        config: dict[str, Any] = {"config_groups": {"group_0": group}, "format": form.format, "ignore": ["lm_head"]}
        config |= {"kv_cache_scheme": None, "quantization_status": "compressed", "sparsity_config": {}}
    elif form.method == "awq":
        config = {"bits": 4, "group_size": size, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
    else:
        config = {"bits": form.bits, "group_size": size, "sym": form.symmetric, "desc_act": form.order == "shuffled"}
        if form.checkpoint_format is not None:
            config["checkpoint_format"] = form.checkpoint_format
    return {"quant_method": form.method, **config, **form.settings}


def make_quantized(folder: Path, form: Form, kind: str = "llama", **options: Any) -> Any:
    """Write a random model of a family with the matrices of its layers in `form`; return it with their weights."""
    model = make_model(kind, SIZES | options)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors, random = load_file(path), np.random.default_rng(0)
    names = [name for name, tensor in tensors.items() if ".layers." in name and tensor.ndim == 2]
    matrices = {
        name: draw(*tensors[name].shape, form, random) for name in names if not name.endswith("mlp.gate.weight")
    }
    tensors |= {name: matrix.weights() for name, matrix in matrices.items()}
    save_file(tensors, path, {"format": "pt"})
    model = type(model).from_pretrained(folder, attn_implementation="eager", experts_implementation="eager").eval()
    for name, matrix in matrices.items():
        del tensors[name]
        parts = parts_of(matrix, form)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": config_of(form)}))
    return model
