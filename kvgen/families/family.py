"""What defines a family: a config reader, tables of tensor names, and tensor transforms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.model.config import DecoderConfig

NameTable = Mapping[str, str | None]
Transform = Callable[[Tensor], Tensor]
Transforms = Mapping[str, Transform]

GGUF_NAMES: NameTable = {
    "token_embd": "token_embd",
    "position_embd": "position_embd",
    "output_norm": "output_norm",
    "output": "output",
    "rope_freqs": None,  # the rope tensors are read with the config
    "rope_factors_long": None,
    "rope_factors_short": None,
    "blk.{i}.attn_norm": "blk.{i}.attn_norm",
    "blk.{i}.attn_q": "blk.{i}.attn.q",
    "blk.{i}.attn_k": "blk.{i}.attn.k",
    "blk.{i}.attn_v": "blk.{i}.attn.v",
    "blk.{i}.attn_qkv": "blk.{i}.attn.qkv",
    "blk.{i}.attn_q_norm": "blk.{i}.attn.q_norm",
    "blk.{i}.attn_k_norm": "blk.{i}.attn.k_norm",
    "blk.{i}.attn_output": "blk.{i}.attn.output",
    "blk.{i}.post_attention_norm": "blk.{i}.post_attention_norm",
    "blk.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "blk.{i}.ffn_gate": "blk.{i}.ffn.gate",
    "blk.{i}.ffn_up": "blk.{i}.ffn.up",
    "blk.{i}.ffn_down": "blk.{i}.ffn.down",
    "blk.{i}.post_ffw_norm": "blk.{i}.post_ffw_norm",
}
"""llama.cpp's tensor names, the same for all families."""

_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "ffn.gate_up": ("ffn.gate", "ffn.up")}


def _no_transforms(config: DecoderConfig) -> Transforms:
    return {}


@dataclass(frozen=True)
class Family:
    """One model family, as data.

    hf_model_type, gguf_architecture: its name in config.json and in GGUF files; "" if that format has none.
    config: reads the decoder config from a checkpoint's metadata and tensor names.
    hf_names, gguf_names: tensor names in a checkpoint -> the decoder's parameter names, both without `.weight` and
        `.bias`. `{i}` stands for the layer; tensors that differ only in `{j}` are stacked. None: a known tensor that
        is not needed. Fused projections map to `attn.qkv` or `ffn.gate_up` and are split in that order.
    hf_transforms, gguf_transforms: per config, a function for each layer name inside a block (`attn.q`), applied to its
        weight and bias before fused tensors are split.
    """

    hf_model_type: str
    gguf_architecture: str
    config: Callable[[RawCheckpoint], DecoderConfig]
    hf_names: NameTable
    gguf_names: NameTable = field(default_factory=lambda: GGUF_NAMES)
    gguf_transforms: Callable[[DecoderConfig], Transforms] = _no_transforms
    hf_transforms: Callable[[DecoderConfig], Transforms] = _no_transforms

    def sources(self, raw: RawCheckpoint) -> tuple[dict[str, list[str]], list[str]]:
        """Apply the name table of a checkpoint's format; see `parameter_sources`."""
        return parameter_sources(raw.tensors, self.gguf_names if raw.format == "gguf" else self.hf_names)

    def transforms(self, raw: RawCheckpoint, config: DecoderConfig) -> Transforms:
        return self.gguf_transforms(config) if raw.format == "gguf" else self.hf_transforms(config)


def parameter_sources(tensor_names: Iterable[str], table: NameTable) -> tuple[dict[str, list[str]], list[str]]:
    """Return the tensors for each decoder parameter (or fused group), and the tensors that `table` lacks."""
    found: dict[str, dict[int, str]] = {}
    unknown = []
    for name in tensor_names:
        stem, _, kind = name.rpartition(".")
        pattern, numbers = stem, re.findall(r"(?<=\.)\d+(?=\.|$)", stem)
        for number, letter in zip(numbers, "ij", strict=False):
            pattern = re.sub(rf"(?<=\.){number}(?=\.|$)", f"{{{letter}}}", pattern, count=1)
        if pattern not in table or (table[pattern] is not None and kind not in ("weight", "bias")):
            unknown.append(name)
        elif (target := table[pattern]) is not None:
            parameter = f"{target.replace('{i}', numbers[0] if numbers else '')}.{kind}"
            found.setdefault(parameter, {})[int(numbers[1]) if len(numbers) > 1 else 0] = name
    return {parameter: [names[j] for j in sorted(names)] for parameter, names in found.items()}, unknown


def block_part(parameter: str) -> str:
    """Return the layer of a parameter without its block: `attn.q` for `blk.3.attn.q.bias`."""
    return re.sub(r"^blk\.\d+\.", "", parameter).rpartition(".")[0]


def parts_of(parameter: str) -> list[str]:
    """Return the decoder parameters in a source: several for a fused one, else itself."""
    part = block_part(parameter)
    return [parameter.replace(part, piece) for piece in _FUSED.get(part, (part,))]


def split_fused(tensor: Tensor, parameter: str, config: DecoderConfig) -> list[Tensor]:
    """Split the rows of a fused tensor into `parts_of(parameter)`. Raises RuntimeError if the sizes do not add up."""
    part = block_part(parameter)
    if part not in _FUSED:
        return [tensor]
    attention, width = config.attention, config.mlp.width
    rows = {"attn.q": attention.heads * attention.head_dim, "ffn.gate": width, "ffn.up": width}
    key_rows = attention.kv_heads * attention.head_dim
    return list(torch.split(tensor, [rows.get(piece, key_rows) for piece in _FUSED[part]]))


def split_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows from interleaved rotation to half-split: pairs (2i, 2i + 1) become (i, i + D / 2).

    rows: (heads * D, ...), a weight or bias of the query or key projection.
    """
    pairs = rows.view(heads, -1, 2, *rows.shape[1:])  # (H, D / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(rows.shape)


def transposed(tensor: Tensor) -> Tensor:
    """Transpose (in, out) to (out, in); leave a bias unchanged."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


def plus_one(tensor: Tensor) -> Tensor:
    """Add 1, for norms that multiply by 1 + w."""
    return tensor.float() + 1
