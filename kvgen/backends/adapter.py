"""Read a LoRA adapter (Hu et al. 2021, arXiv:2106.09685) from a folder that PEFT wrote.

Names of tensors are `base_model.model.`, the Hugging Face name of a module, and `lora_A`, `lora_B` and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvgen.checkpoint.digest import SourceFile, source_file
from kvgen.checkpoint.hf import add_shard
from kvgen.checkpoint.raw import RawTensor, read_json_object
from kvgen.errors import CheckpointError, NotFoundError, UnsupportedError
from kvgen.families.fields import Fields

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FLOATS = ("F64", "F32", "F16", "BF16")
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")  # of PEFT around a module; not in the model's names
# Fields that only training uses, or that the tensors tell as well. Of any other, only null, false and nothing is known.
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"}
_UNUSED = {
    *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_version"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size"),  # of a start or a kind
    *("revision", "target_modules", "task_type"),
}
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the weights of the model as well
_MAX_REPEATS, _MAX_NAME = 2, 200  # in a pattern of names, and of characters, so that matching does not take forever


@dataclass(frozen=True)
class LowRank:
    """A change of one weight W, (out, in): W + scale * B A.

    a: (r, in). b: (out, r). embedding: W is an embedding, stored as (in, out).
    magnitude: the norm that each row then gets, (out); None to leave it (DoRA, Liu et al. 2024, arXiv:2402.09353).
    """

    a: RawTensor
    b: RawTensor
    scale: float
    embedding: bool
    magnitude: RawTensor | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter, whose tensors stay on disk until they are read.

    rank, alpha: of the config; `rank_pattern` and `alpha_pattern` may give some weights others.
    low_rank, replaced: changes of weights, and tensors that replace whole ones, by Hugging Face tensor names.
    """

    path: Path
    files: tuple[SourceFile, ...]
    rank: int
    alpha: float
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, RawTensor]

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The last part of the names of the modules that have low-rank changes."""
        return tuple(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in self.low_rank}))

    @property
    def nbytes(self) -> int:
        parts = [part for change in self.low_rank.values() for part in (change.a, change.b, change.magnitude)]
        return sum(part.nbytes for part in (*parts, *self.replaced.values()) if part is not None)

    @property
    def kind(self) -> str:
        return "DoRA" if any(change.magnitude for change in self.low_rank.values()) else "LoRA"

    def as_data(self) -> dict[str, Any]:
        """Return the adapter's description as JSON data."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": self.targets,
            "weights": len(self.low_rank),
            "whole_tensors": len(self.replaced),
            "bytes": self.nbytes,
        }


def read_adapter(folder: str | Path) -> Adapter:
    """Read a folder with adapter_config.json and adapter_model.safetensors.

    Raises NotFoundError, CheckpointError if a file is damaged, UnsupportedError for other kinds of adapters.
    """
    folder = Path(folder)
    config, weights = folder / _CONFIG, folder / _WEIGHTS
    if not folder.exists():
        raise NotFoundError(f"{folder}: no such folder")
    if not config.exists():
        raise CheckpointError(f"{folder}: has no {_CONFIG}; give the folder of a PEFT adapter")
    fields = Fields(read_json_object(config), config)
    _refuse_other_kinds(fields)
    if not weights.exists():
        raise UnsupportedError(f"{folder}: has no {_WEIGHTS}")
    tensors: dict[str, RawTensor] = {}
    add_shard(tensors, weights)
    parts, replaced = _sort(tensors, weights)
    scales = _Scales(fields)
    return Adapter(
        path=folder,
        files=(source_file(config), source_file(weights)),
        rank=fields.count("r"),
        alpha=fields.number("lora_alpha"),
        low_rank={f"{name}.weight": _pair(name, found, scales, weights) for name, found in parts.items()},
        replaced=replaced,
    )


def _refuse_other_kinds(fields: Fields) -> None:
    fields.require("peft_type", "LORA")
    if fields.get("peft_type") is None:
        raise CheckpointError(f"{fields.path}: peft_type is missing")
    for name, value in fields.values.items():
        if name not in _READ | _UNUSED and value not in (None, False, [], {}):
            raise UnsupportedError(f"{fields.path}: {name} is {value!r:.80}, which kvgen does not support")
    start = fields.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UnsupportedError(
            f"{fields.path}: init_lora_weights is {start!r:.80}, which changes the model too; convert it to plain LoRA"
        )


def _sort(tensors: Mapping[str, RawTensor], path: Path) -> tuple[dict[str, dict[str, RawTensor]], dict[str, RawTensor]]:
    """Return the low-rank parts of each module, and whole tensors, by names in the model."""
    parts: dict[str, dict[str, RawTensor]] = {}
    replaced = {}
    for stored, tensor in tensors.items():
        name = stored.removeprefix(_PREFIX)
        part = _PART.fullmatch(name)
        if name == stored or len(name) > _MAX_NAME or ("lora_" in name and not part):
            raise UnsupportedError(f"{path}: the tensor {stored!r:.200} is not of a LoRA adapter that kvgen supports")
        if tensor.type not in _FLOATS:
            raise UnsupportedError(f"{path}: tensor {stored!r:.200} has the type {tensor.type}")
        if part:
            parts.setdefault(_WRAPPER.sub("", part[1]), {})[part[2]] = tensor
        else:
            replaced[_WRAPPER.sub("", name)] = tensor
    if not tensors:
        raise CheckpointError(f"{path}: has no tensors")
    return parts, replaced


def _pair(module: str, parts: Mapping[str, RawTensor], scales: _Scales, path: Path) -> LowRank:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name in (*names, *(["lora_magnitude_vector"] if scales.has_magnitudes else [])):
        if name not in parts:
            raise CheckpointError(f"{path}: {_PREFIX}{module} has no {name}")
    if len(parts) > 2 + scales.has_magnitudes:
        raise CheckpointError(f"{path}: {_PREFIX}{module} has more than {' and '.join(names)}: {', '.join(parts)}")
    a, b = (parts[name] for name in names)
    rank, scale = scales.of(module)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UnsupportedError(f"{path}: {_PREFIX}{module} is a convolution, whose LoRA kvgen does not support")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{path}: {_PREFIX}{module} has {names[0]} of shape {a.shape} and {names[1]} of shape {b.shape}, "
            f"but the rank {rank} in {_CONFIG}"
        )
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise CheckpointError(
            f"{path}: {_PREFIX}{module} has a magnitude of shape {magnitude.shape}, not {b.shape[:1]}"
        )
    return LowRank(a, b, scale, embedding, magnitude)


class _Scales:
    """The rank of each module, and the scale of its change."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.has_magnitudes, self.root = fields.flag("use_dora", False), fields.flag("use_rslora", False)
        self.ranks, self.alphas = _read_pattern(fields, "rank_pattern"), _read_pattern(fields, "alpha_pattern")

    def of(self, module: str) -> tuple[int, float]:
        """Return rank and scale. `use_rslora`: Kalajdzievski 2023, arXiv:2312.03732."""
        ranks, alphas = (_matching(patterns, module) for patterns in (self.ranks, self.alphas))
        rank = self.fields.count("r") if ranks is None else ranks.count("rank_pattern")
        alpha = self.fields.number("lora_alpha") if alphas is None else alphas.number("alpha_pattern")
        return rank, alpha / (math.sqrt(rank) if self.root else rank)


def _read_pattern(fields: Fields, name: str) -> list[tuple[re.Pattern[str], Fields]]:
    """Read a table of expressions for the ends of names. Raises UnsupportedError for those that may take forever."""
    section = fields.section(name)
    found = []
    for pattern, value in ({} if section is None else section.values).items():
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > _MAX_REPEATS:
            raise UnsupportedError(f"{fields.path}: {name} has the expression {pattern!r:.80}, which is too complex")
        try:
            found.append((re.compile(rf"(?:.*\.)?(?:{pattern})"), Fields({name: value}, fields.path)))
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{fields.path}: {name} has the expression {pattern!r:.80} ({error})") from error
    return found


def _matching(patterns: list[tuple[re.Pattern[str], Fields]], module: str) -> Fields | None:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), None)
