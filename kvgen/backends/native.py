"""kvgen's own decoder as a backend, and how it is made from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.contract import Backend
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.families import Family, find_family
from kvgen.families.family import block_part, parts_of, take_apart
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


@dataclass(frozen=True)
class Blueprint:
    """What a checkpoint will be, before any of its tensors is read.

    decoder: on the meta device. sources: for each parameter, or fused group of them, the tensors it comes from.
    """

    family: Family
    decoder: Decoder
    sources: Mapping[str, Sequence[str]]


def draw_blueprint(raw: RawCheckpoint) -> Blueprint:
    """Raises CheckpointError for tensors that are missing or unknown, UnsupportedError for what kvgen does not run."""
    family = find_family(raw)
    config = family.config(raw)
    sources, unknown = family.sources(raw)
    try:
        with torch.device("meta"):
            decoder = Decoder(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{raw.path}: the sizes in its config are absurd ({error})") from error
    wanted = {name for name, _ in decoder.named_parameters()}
    homes = {parameter: source for source in sources for parameter in parts_of(source)}
    _check_names(raw.path, missing=wanted - homes.keys(), unknown=unknown)
    _check_names(raw.path, missing=[], unknown=[sources[homes[name]][0] for name in homes.keys() - wanted])
    return Blueprint(family, decoder, sources)


def load_native(raw: RawCheckpoint, dtype: torch.dtype, device: torch.device, pool: Executor) -> NativeBackend:
    """Build the decoder that a checkpoint describes and read its tensors, in parallel.

    Raises CheckpointError for tensors that do not fit, UnsupportedError for what kvgen does not implement.
    """
    blueprint = draw_blueprint(raw)
    model, sources, config = blueprint.decoder, blueprint.sources, blueprint.decoder.config
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    transforms = blueprint.family.transforms(raw, config)

    def read(source: str) -> list[tuple[str, Tensor]]:
        tensors = [_read_floats(raw, name) for name in sources[source]]
        where = f"{raw.path}: tensor {sources[source][0]!r}"
        try:
            tensor = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
            transform = transforms.get(block_part(source))
            pieces = take_apart(transform(tensor) if transform else tensor, source, config)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{where} does not fit the config ({error})") from error
        named = list(zip(parts_of(source), pieces, strict=True))
        for name, piece in named:
            if piece.shape != shapes[name]:
                raise CheckpointError(f"{where} has the shape {tuple(piece.shape)}, not {shapes[name]}")
        placed = [(name, piece.to(device=device, dtype=dtype)) for name, piece in named]
        if all(piece.data_ptr() != tensor.data_ptr() for _, piece in placed for tensor in tensors):
            for name in sources[source]:
                raw.tensors[name].release()
        return placed

    state = dict(chain.from_iterable(pool.map(read, sources)))
    model.load_state_dict(state, strict=True, assign=True)
    return NativeBackend(model.requires_grad_(False).to(device))


def _read_floats(raw: RawCheckpoint, name: str) -> Tensor:
    tensor = raw.tensors[name].read()
    if not tensor.is_floating_point():
        raise UnsupportedError(f"{raw.path}: tensor {name!r} has the type {raw.tensors[name].type}")
    return tensor


def _check_names(path: Path, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
    for what, names in (
        ("is missing", sorted(missing)),
        ("is not part of this kind of model", sorted(unknown)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: the tensor {names[0]!r}{more} {what}")
