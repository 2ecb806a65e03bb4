"""What a family is: a config reader, a table of tensor names, and tensor transforms."""

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

# llama.cpp gives the tensors of all families the same names.
GGUF_NAMES: NameTable = {
    "token_embd": "token_embd",
    "position_embd": "position_embd",
    "output_norm": "output_norm",
    "output": "output",
    "rope_freqs": None,  # these three are read with the config
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

_FUSED = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "ffn.gate_up": ("ffn.gate", "ffn.up"),
    "ffn.up_gate": ("ffn.up", "ffn.gate"),
}


def _no_transforms(config: DecoderConfig) -> Transforms:
    return {}


def _same_name(name: str) -> str:
    return name


@dataclass(frozen=True)
class Family:
    """One family of models, as data over the one decoder.

    hf_model_type, gguf_architecture: what its checkpoints call themselves; "" where there are none.
    config: reads the decoder config from a checkpoint's metadata (and, for facts, its tensors).
    hf_names, gguf_names: the names in a checkpoint, `{i}` for the layer and without `.weight` or `.bias`, to the
        decoder's names for them; None for a tensor that is known and not needed. Rows that a checkpoint keeps in
        one tensor go by `attn.qkv`, `ffn.gate_up` or `ffn.up_gate`, in that order. Tensors of one name but for
        `{j}` are stacked.
    hf_transforms, gguf_transforms: for each config, what to do with a tensor before it is taken apart or fits the
        decoder, by its name inside a block (`attn.q`, for weight and bias alike).
    rename: applied to each tensor's name first, where a table cannot tell them apart.
    """

    hf_model_type: str
    gguf_architecture: str
    config: Callable[[RawCheckpoint], DecoderConfig]
    hf_names: NameTable
    gguf_names: NameTable = field(default_factory=lambda: GGUF_NAMES)
    gguf_transforms: Callable[[DecoderConfig], Transforms] = _no_transforms
    hf_transforms: Callable[[DecoderConfig], Transforms] = _no_transforms
    rename: Callable[[str], str] = _same_name

    def sources(self, raw: RawCheckpoint) -> tuple[dict[str, list[str]], list[str]]:
        """For each parameter, or fused group of them, the tensors that it comes from; and the unknown tensors."""
        names = self.gguf_names if raw.format == "gguf" else self.hf_names
        return parameter_sources(raw.tensors, names, self.rename)

    def transforms(self, raw: RawCheckpoint, config: DecoderConfig) -> Transforms:
        return self.gguf_transforms(config) if raw.format == "gguf" else self.hf_transforms(config)


def parameter_sources(
    tensor_names: Iterable[str], table: NameTable, rename: Callable[[str], str] = _same_name
) -> tuple[dict[str, list[str]], list[str]]:
    """Apply a name table: decoder parameter -> tensor names, and the tensor names that the table does not have."""
    found: dict[str, dict[int, str]] = {}
    unknown = []
    for name in tensor_names:
        stem, _, kind = rename(name).rpartition(".")
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
    """The name of a parameter's layer inside its block: `blk.3.attn.q.bias` is of `attn.q`."""
    return re.sub(r"^blk\.\d+\.", "", parameter).rpartition(".")[0]


def parts_of(parameter: str) -> list[str]:
    """The decoder parameters that a source holds: itself, or those that were fused into it."""
    part = block_part(parameter)
    return [parameter.replace(part, piece) for piece in _FUSED.get(part, (part,))]


def take_apart(tensor: Tensor, parameter: str, config: DecoderConfig) -> list[Tensor]:
    """The rows of each of `parts_of(parameter)`. Raises RuntimeError if they do not add up."""
    part = block_part(parameter)
    if part not in _FUSED:
        return [tensor]
    attention, width = config.attention, config.mlp.width
    rows = {"attn.q": attention.heads * attention.head_dim, "ffn.gate": width, "ffn.up": width}
    key_rows = attention.kv_heads * attention.head_dim
    return list(torch.split(tensor, [rows.get(piece, key_rows) for piece in _FUSED[part]]))


def split_halves(rows: Tensor, heads: int, rotated: int | None = None) -> Tensor:
    """Undo the row order of interleaved rotation: pairs (2i, 2i + 1) become (i, i + R / 2).

    rows: (heads * D, ...), a weight or a bias of the query or key projection. rotated: R, the dimensions of a head
    that are rotated, its first; all by default.
    """
    by_head = rows.view(heads, -1, *rows.shape[1:])  # (H, D, ...)
    turned = by_head[:, :rotated]
    pairs = turned.reshape(heads, -1, 2, *rows.shape[1:])  # (H, R / 2, 2, ...)
    halves = pairs.transpose(1, 2).flatten(1, 2)
    rest = by_head[:, turned.shape[1] :]
    return torch.cat((halves, rest), dim=1).reshape(rows.shape)


def transposed(tensor: Tensor) -> Tensor:
    """(in, out) to (out, in); a bias as it is."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


def plus_one(tensor: Tensor) -> Tensor:
    """For norms that multiply by 1 + w."""
    return tensor.float() + 1
