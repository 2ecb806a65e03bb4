"""kvgen's own decoder as a backend, and how it is made from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.contract import Backend
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families import find_family
from kvgen.families.family import block_part, parameter_names
from kvgen.model.cache import KVCache
from kvgen.model.decoder import Decoder


class NativeBackend(Backend):
    """A `Decoder`, whose cache knows its text."""

    name = "native"
    rewinds = True

    def __init__(self, decoder: Decoder) -> None:
        self.module: Decoder = decoder
        weight = decoder.token_embd.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.vocab_size, self.context_length = decoder.config.vocab_size, decoder.config.context_length

    def __call__(self, ids: Tensor, cache: KVCache | None = None, /) -> tuple[Tensor, KVCache]:
        result: tuple[Tensor, KVCache] = self.module(ids, cache)
        return result

    def all_logits(self, ids: Tensor) -> Tensor:
        return self.module.all_logits(ids)

    def trusting(self, new: Tensor, cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """With the guard switched off, what a cache does that does not know its text: positions restart at 0."""
        return self.module.append(new, cache, start=0)

    def placed(self, ids: Tensor, cache: KVCache | None, positions: Tensor) -> tuple[Tensor, KVCache]:
        """Keys are cached as they were rotated, so only the positions of what is new can be chosen."""
        known = 0 if cache is None else cache.length
        return self.module.append(ids[:, known:], cache, start=int(positions[known]))

    def in_float64(self) -> NativeBackend:
        return NativeBackend(copy.deepcopy(self.module).to(torch.float64))


def load_native(raw: RawCheckpoint, dtype: torch.dtype, device: torch.device, pool: Executor) -> NativeBackend:
    """Build the decoder that a checkpoint describes and read its tensors, in parallel.

    Raises CheckpointError for tensors that do not fit, UnsupportedError for what kvgen does not implement.
    """
    family = find_family(raw)
    config = family.config(raw)
    found, unknown = parameter_names(raw.tensors, family.names(raw))
    if config.layers > len(found):  # before a decoder of a million layers is built
        raise CheckpointError(f"{raw.path}: says {config.layers} layers, but holds {len(found)} tensors")
    try:
        with torch.device("meta"):
            model = Decoder(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{raw.path}: the sizes in its config are absurd ({error})") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _check_names(raw.path, missing=shapes.keys() - found.keys(), unknown=unknown)
    _check_names(raw.path, missing=[], unknown=[found[name] for name in found.keys() - shapes.keys()])
    for name, shape in shapes.items():
        actual = raw.tensors[found[name]].shape
        if actual != shape:
            raise CheckpointError(f"{raw.path}: tensor {found[name]!r} has the shape {actual}, not {shape}")
    transforms = family.transforms(raw, config)

    def read(name: str) -> tuple[str, Tensor]:
        tensor = raw.tensors[found[name]].read()
        if not tensor.is_floating_point():
            raise UnsupportedError(f"{raw.path}: tensor {found[name]!r} has the type {raw.tensors[found[name]].type}")
        transform = transforms.get(block_part(name))
        return name, (transform(tensor) if transform else tensor).to(device=device, dtype=dtype)

    model.load_state_dict(dict(pool.map(read, shapes)), strict=True, assign=True)
    return NativeBackend(model.requires_grad_(False).to(device))


def _check_names(path: Path, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
    for what, names in (
        ("is missing", sorted(missing)),
        ("is not part of this kind of model", sorted(unknown)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: the tensor {names[0]!r}{more} {what}")
