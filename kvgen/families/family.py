"""What defines a family: a config reader, tables of tensor names, and tensor transforms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import DeltaNet, LatentAttention

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
    "blk.{i}.attn_sinks": "blk.{i}.attn.sinks",
    "blk.{i}.post_attention_norm": "blk.{i}.post_attention_norm",
    "blk.{i}.ffn_norm": "blk.{i}.ffn_norm",
    "blk.{i}.ffn_gate": "blk.{i}.ffn.gate",
    "blk.{i}.ffn_up": "blk.{i}.ffn.up",
    "blk.{i}.ffn_down": "blk.{i}.ffn.down",
    "blk.{i}.post_ffw_norm": "blk.{i}.post_ffw_norm",
    "blk.{i}.ffn_gate_inp": "blk.{i}.ffn.router",
    "blk.{i}.exp_probs_b": "blk.{i}.ffn.router.selection",
    "blk.{i}.ffn_gate_exps": "blk.{i}.ffn.experts.gate",
    "blk.{i}.ffn_up_exps": "blk.{i}.ffn.experts.up",
    "blk.{i}.ffn_down_exps": "blk.{i}.ffn.experts.down",
    "blk.{i}.ffn_gate_up_exps": "blk.{i}.ffn.experts.gate_up",
    "blk.{i}.ffn_gate_shexp": "blk.{i}.ffn.shared.gate",
    "blk.{i}.ffn_up_shexp": "blk.{i}.ffn.shared.up",
    "blk.{i}.ffn_down_shexp": "blk.{i}.ffn.shared.down",
    "blk.{i}.ffn_gate_inp_shexp": "blk.{i}.ffn.shared_gate",
}
"""llama.cpp's tensor names, the same for most families."""

GGUF_NORM_NAMES: NameTable = {**GGUF_NAMES, "blk.{i}.post_attention_norm": "blk.{i}.ffn_norm"}
"""Those of some newer families, where the norm before the MLP has its name of transformers."""

_FUSED = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn.q_gate": ("attn.q", "attn.gate"),
    "attn.kv_b": ("attn.k_b", "attn.v_b"),
    "attn.in_proj_gate": ("attn.in_proj", "attn.gate"),
    "attn.ba": ("attn.b", "attn.a"),
    "ffn.gate_up": ("ffn.gate", "ffn.up"),
    "ffn.experts.gate_up": ("ffn.experts.gate", "ffn.experts.up"),
    "ffn.shared.gate_up": ("ffn.shared.gate", "ffn.shared.up"),
}


@dataclass(frozen=True)
class OfColumns:
    """Changes the columns of a matrix as `rows` does rows."""

    rows: Transform

    def __call__(self, matrix: Tensor) -> Tensor:
        return self.rows(matrix.T.contiguous()).T.contiguous()


def _no_transforms(config: DecoderConfig) -> Transforms:
    return {}


@dataclass(frozen=True)
class Family:
    """One model family, as data.

    hf_model_type, gguf_architecture: its name in config.json and in GGUF files; "" if that format has none.
    config: reads the decoder config from a checkpoint's metadata and tensor names.
    hf_names, gguf_names: tensor names in a checkpoint -> the decoder's parameter names, both without `.weight` and
        `.bias`; for a tensor whose name does not end so, both whole. `{i}` stands for the layer; tensors that differ
        only in `{j}`, or in an `{i}` that the parameter's name lacks, are stacked. None: a known tensor that is not
        needed. Fused projections map to `attn.qkv` or `ffn.gate_up` and are split in that order.
    hf_transforms, gguf_transforms: per config, a function for each layer name inside a block (`attn.q`), applied to its
        weight and bias before fused tensors are split; or for one of them (`attn_norm.weight`).
    hf_multipliers: further transforms, whose numbers config.json gives.
    ignores: whether a tensor, by its name in the checkpoint, is known but not needed, besides those of the tables.
    variant: the family that reads a checkpoint whose tensors have other meanings; None if this one does.
    """

    hf_model_type: str
    gguf_architecture: str
    config: Callable[[RawCheckpoint], DecoderConfig]
    hf_names: NameTable
    gguf_names: NameTable = field(default_factory=lambda: GGUF_NAMES)
    gguf_transforms: Callable[[DecoderConfig], Transforms] = _no_transforms
    hf_transforms: Callable[[DecoderConfig], Transforms] = _no_transforms
    hf_multipliers: Callable[[RawCheckpoint, DecoderConfig], Transforms] = lambda raw, config: {}
    ignores: Callable[[str, DecoderConfig], bool] = lambda name, config: False
    variant: Callable[[RawCheckpoint], Family | None] = lambda raw: None

    def sources(self, raw: RawCheckpoint, config: DecoderConfig) -> tuple[dict[str, list[str]], list[str]]:
        """Apply the name table of a checkpoint's format; see `parameter_sources`."""
        names = [name for name in raw.tensors if not self.ignores(name, config)]
        return parameter_sources(names, self.gguf_names if raw.format == "gguf" else self.hf_names)

    def transforms(self, raw: RawCheckpoint, config: DecoderConfig) -> Transforms:
        if raw.format == "gguf":
            return self.gguf_transforms(config)
        return {**self.hf_transforms(config), **self.hf_multipliers(raw, config)}


def predicts_further(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor belongs to a layer beyond those of the config, which predicts the token after the next
    (DeepSeek-V3, arXiv:2412.19437, section 2.2). For `Family.ignores`."""
    found = re.match(r"(?:model\.layers|blk)\.(\d+)\.", name)
    return found is not None and int(found[1]) >= len(config.layers)


def predicts_ahead(name: str, config: DecoderConfig) -> bool:
    """`predicts_further`, where such layers may also have names of their own."""
    return name.startswith("mtp.") or predicts_further(name, config)


def transform_of(transforms: Transforms, parameter: str) -> Transform | None:
    """Return the function for a parameter: that of its layer, or its own."""
    part = block_part(parameter)
    return transforms.get(part) or transforms.get(f"{part}.{parameter.rpartition('.')[2]}")


def parameter_sources(tensor_names: Iterable[str], table: NameTable) -> tuple[dict[str, list[str]], list[str]]:
    """Return the tensors for each decoder parameter (or fused group), and the tensors that `table` lacks."""
    found: dict[str, dict[int, str]] = {}
    unknown = []
    for name in tensor_names:
        stem, _, kind = name.rpartition(".")
        pattern, numbers = stem, re.findall(r"(?<=\.)\d+(?=\.|$)", stem)
        for number, letter in zip(numbers, "ij", strict=False):
            pattern = re.sub(rf"(?<=\.){number}(?=\.|$)", f"{{{letter}}}", pattern, count=1)
        whole = f"{pattern}.{kind}" in table
        target = table[f"{pattern}.{kind}"] if whole else table.get(pattern, "")
        if target == "" or (target is not None and not whole and kind not in ("weight", "bias")):
            unknown.append(name)
        elif target is not None:
            parameter = target.replace("{i}", numbers[0] if numbers else "") + ("" if whole else f".{kind}")
            stacked = numbers[target.count("{i}") :]
            found.setdefault(parameter, {})[int(stacked[0]) if stacked else 0] = name
    unknown += [name for names in found.values() if max(names) != len(names) - 1 for name in names.values()]
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
    if part == "attn.kv_b":
        return _split_heads(tensor, config)
    if part == "attn.in_proj_gate":
        net = next(mixer for mixer in config.recurrences if isinstance(mixer, DeltaNet))
        return list(torch.split(tensor, [net.convolved, net.inner]))
    if part != "attn.qkv":
        dim = 1 if part == "ffn.experts.gate_up" else 0
        return list(torch.split(tensor, [tensor.shape[dim] // 2] * 2, dim))
    attention = config.attention
    rows, key_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return list(torch.split(tensor, [rows, key_rows, key_rows]))


def _split_heads(rows: Tensor, config: DecoderConfig) -> list[Tensor]:
    """Split the rows of keys and values of latent attention, of which each head has its own."""
    mixer = next(layer.mixer for layer in config.layers if isinstance(layer.mixer, LatentAttention))
    sizes = [mixer.key_dim, mixer.value_dim]
    return list(torch.split(by_part(rows, mixer.heads, sizes), [mixer.heads * size for size in sizes]))


def by_part(rows: Tensor, groups: int, sizes: Sequence[int]) -> Tensor:
    """Reorder rows, (groups * sum(sizes), ...), from all parts of each group to each part of all groups."""
    parts = torch.split(rows.view(groups, sum(sizes), *rows.shape[1:]), list(sizes), dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])


def split_halves(rows: Tensor, heads: int, rotated: int | None = None) -> Tensor:
    """Reorder rows from interleaved rotation to half-split: pairs (2i, 2i + 1) become (i, i + R / 2).

    rows: (heads * D, ...), a weight or bias of the query or key projection. rotated: R, the dimensions of a head that
    are rotated; None for D.
    """
    whole = rows.view(heads, -1, *rows.shape[1:])  # (H, D, ...)
    turned, rest = whole[:, :rotated], whole[:, whole.shape[1] if rotated is None else rotated :]
    return torch.cat((turned[:, 0::2], turned[:, 1::2], rest), dim=1).reshape(rows.shape)


def transposed(tensor: Tensor) -> Tensor:
    """Transpose (in, out) to (out, in); leave a bias unchanged."""
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


def plus_one(tensor: Tensor) -> Tensor:
    """Add 1, for norms that multiply by 1 + w."""
    return tensor.float() + 1
