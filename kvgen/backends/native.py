"""kvgen's own decoder as a backend, and how it is made from a checkpoint."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvgen.checkpoint import RawCheckpoint
from kvgen.checkpoint.grouped import Grouped, quantized
from kvgen.contract import Backend
from kvgen.errors import CacheError, CheckpointError, UnsupportedError
from kvgen.families import Family, find_family
from kvgen.families.family import block_part, parts_of, take_apart
from kvgen.kernels.fused import FusedDecoder
from kvgen.kernels.packed import Packed
from kvgen.model.cache import KVCache, Room, cache_bytes, row_length
from kvgen.model.decoder import Decoder
from kvgen.model.layers import Linear


class NativeBackend(Backend):
    """kvgen's own decoder, whose cache knows its text.

    decoder: on torch, or on the kernels. module: the decoder on torch.
    numerics: what cached numbers depend on besides weights and text.
    """

    name = "native"
    rewinds = True

    def __init__(
        self,
        decoder: Decoder | FusedDecoder,
        engine: str = "torch",
        kv_dtype: torch.dtype | None = None,
        numerics: str = "",
    ) -> None:
        decoder.kv_dtype, self.numerics = kv_dtype, numerics
        self.decoder, self.engine = decoder, engine
        self.module = decoder if isinstance(decoder, Decoder) else None
        weight = torch.empty(0) if self.module is None else self.module.token_embd.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.vocab_size, self.context_length = decoder.config.vocab_size, decoder.config.context_length
        sizes = {name: parameter.nbytes for name, parameter in self._weights()}
        looked_up = {"position_embd.weight", *([] if decoder.config.tied_head else ["token_embd.weight"])}
        self.weight_bytes = sum(sizes.values())
        self.step_bytes = sum(size for name, size in sizes.items() if name not in looked_up)
        self.position_bytes, _ = cache_bytes(decoder.config, decoder.kv_dtype or self.dtype)

    def _weights(self) -> Iterable[tuple[str, Tensor | Packed]]:
        return self.decoder.named_parameters() if isinstance(self.decoder, Decoder) else self.decoder.weights.items()

    def __call__(self, ids: Tensor, cache: KVCache | None = None, /) -> tuple[Tensor, KVCache]:
        return self.decoder.forward(ids, cache)

    def all_logits(self, ids: Tensor) -> Tensor:
        return self.decoder.all_logits(ids)

    def restored(self, tokens: Tensor, rooms: Sequence[Room], variant: int) -> KVCache:
        """The cache that `KVCache.held` described, of these token ids. Raises CacheError where it does not fit."""
        config, dtype = self.decoder.config, self.decoder.kv_dtype
        shape = (tokens.shape[0], config.kv_heads, row_length(config.head_dim, dtype))
        for room in rooms:
            for tensor in (room.keys, room.values):
                if tensor.dtype != (dtype or self.dtype) or (*tensor.shape[:2], *tensor.shape[3:]) != shape:
                    raise CacheError(f"a layer of {tensor.dtype} and shape {tuple(tensor.shape)}")
        if len(rooms) != len(config.layers):
            raise CacheError(f"{len(rooms)} layers, not {len(config.layers)}")
        cache = KVCache(self.decoder, dtype)
        cache.restore(tokens, rooms, [layer.window for layer in config.layers], variant)
        return cache

    def most_drafts(self, length: int) -> int:
        """Not beyond where a rotation takes other frequencies: they would change the logits before it, too."""
        config = self.decoder.config
        ends = [rotary.short_length for rotary in config.rotaries if rotary.long_frequencies]
        room = (self.context_length or sys.maxsize) - length
        return max(0, min([room, *(end - length for end in ends if length <= end)]))

    def speculate(self, ids: Tensor, cache: KVCache | None, count: int) -> tuple[Tensor, KVCache]:
        return self.decoder.forward(ids, cache, last=count)

    def trusting(self, new: Tensor, cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """With the guard switched off, what a cache does that does not know its text: positions restart at 0."""
        return self.decoder.append(new, cache, start=0)

    def placed(self, ids: Tensor, cache: KVCache | None, positions: Tensor) -> tuple[Tensor, KVCache]:
        """Keys are cached as they were rotated, so only the positions of what is new can be chosen."""
        known = 0 if cache is None else cache.length
        return self.decoder.append(ids[:, known:], cache, start=int(positions[known]))

    def in_float64(self) -> NativeBackend:
        if isinstance(self.decoder, FusedDecoder):
            return NativeBackend(self.decoder.unfused(torch.float64))
        return NativeBackend(copy.deepcopy(self.decoder).to(torch.float64))


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


@dataclass(frozen=True)
class Arithmetic:
    """How a decoder is to compute.

    dtype: of the computation; on torch of the weights too. fused: on the kernels, where weights stay as they are.
    quantize: `auto`, weights as they are stored; `none`, integers as floats; `int8` or `int4`, floats as integers.
    kv_dtype: of cached keys and values; None for `dtype`.
    engine: what it is called.
    """

    dtype: torch.dtype
    device: torch.device
    fused: bool = False
    quantize: str = "auto"
    kv_dtype: torch.dtype | None = None
    engine: str = "torch"

    @property
    def numerics(self) -> str:
        """What numbers depend on besides weights and text, for people and to compare."""
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kv_dtype or self.dtype)]
        return f"{'kernels' if self.fused else self.device.type} {names[0]}, cache {names[1]}, weights {self.quantize}"


def load_native(raw: RawCheckpoint, arithmetic: Arithmetic, pool: Executor) -> NativeBackend:
    """Build the decoder that a checkpoint describes and read its tensors, in parallel.

    Raises CheckpointError for tensors that do not fit, UnsupportedError for what kvgen does not implement.
    """
    blueprint = draw_blueprint(raw)
    reader = _Reader(raw, blueprint, arithmetic)
    state = dict(chain.from_iterable(pool.map(reader.read, blueprint.sources)))
    if arithmetic.fused:
        fused = FusedDecoder(blueprint.decoder.config, state)
        return NativeBackend(fused, arithmetic.engine, arithmetic.kv_dtype, arithmetic.numerics)
    model = blueprint.decoder
    model.load_state_dict(state, strict=True, assign=True)
    model = model.requires_grad_(False).to(arithmetic.device)
    return NativeBackend(model, arithmetic.engine, arithmetic.kv_dtype, arithmetic.numerics)


class _Reader:
    """Reads the tensors of a checkpoint as the decoder's parameters."""

    def __init__(self, raw: RawCheckpoint, blueprint: Blueprint, arithmetic: Arithmetic) -> None:
        self.raw, self.sources, self.arithmetic = raw, blueprint.sources, arithmetic
        self.config = blueprint.decoder.config
        self.shapes = {name: tuple(parameter.shape) for name, parameter in blueprint.decoder.named_parameters()}
        self.transforms = blueprint.family.transforms(raw, self.config)
        linear = (name for name, module in blueprint.decoder.named_modules() if isinstance(module, Linear))
        self.matrices = {f"{name}.weight" for name in (*linear, "token_embd")}

    def read(self, source: str) -> list[tuple[str, Any]]:
        """The parameters that a source holds, by name: ready for the decoder, on torch or on the kernels."""
        names = self.sources[source]
        where = f"{self.raw.path}: tensor {names[0]!r}"
        try:
            pieces: Sequence[Tensor | Grouped] = self._as_integers(source) or self._as_floats(source)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{where} does not fit the config ({error})") from error
        placed = []
        for name, piece in zip(parts_of(source), pieces, strict=True):
            if tuple(piece.shape) != self.shapes[name]:
                raise CheckpointError(f"{where} has the shape {tuple(piece.shape)}, not {self.shapes[name]}")
            placed.append((name, self._placed(name, piece)))
        kept = {piece.data_ptr() for _, piece in placed if isinstance(piece, Tensor)}
        if kept.isdisjoint(piece.data_ptr() for piece in pieces if isinstance(piece, Tensor)):
            for name in names:
                self.raw.tensors[name].release()
        return placed

    def _as_integers(self, source: str) -> list[Grouped] | None:
        """The pieces of a source as the integers that it is stored in; None if that cannot be or is not wanted."""
        names = self.sources[source]
        if self.arithmetic.quantize == "none" or not self.arithmetic.fused or len(names) > 1:
            return None
        if not self.matrices.issuperset(parts_of(source)):
            return None
        grouped = self.raw.tensors[names[0]].read_grouped()
        if grouped is None:
            return None
        transform = self.transforms.get(block_part(source))
        index = torch.arange(grouped.shape[0], dtype=torch.float64)[:, None]
        moved = transform(index) if transform else index
        if moved.shape != index.shape or not torch.equal(moved.sort(0).values, index):
            return None  # it does more than to order rows
        pieces = take_apart(moved, source, self.config)
        return (
            [grouped] if len(pieces) == 1 and not transform else [grouped.rows(piece[:, 0].long()) for piece in pieces]
        )

    def _as_floats(self, source: str) -> list[Tensor]:
        tensors = [_read_floats(self.raw, name) for name in self.sources[source]]
        tensor = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
        transform = self.transforms.get(block_part(source))
        return take_apart(transform(tensor) if transform else tensor, source, self.config)

    def _placed(self, name: str, piece: Tensor | Grouped) -> Tensor | Packed:
        arithmetic = self.arithmetic
        if name in self.matrices and isinstance(piece, Tensor) and arithmetic.quantize in ("int8", "int4"):
            piece = _rounded(piece, 4 if arithmetic.quantize == "int4" and block_part(name) != name else 8)
        if arithmetic.fused and name in self.matrices:
            return Packed(piece)
        floats = piece.dequantized() if isinstance(piece, Grouped) else piece
        return floats.to(device=arithmetic.device, dtype=arithmetic.dtype)


def _rounded(matrix: Tensor, bits: int) -> Tensor | Grouped:
    """Of `bits` bits, if its rows divide into groups."""
    return matrix if matrix.shape[1] % 32 else quantized(matrix, bits)


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
