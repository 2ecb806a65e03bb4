"""Read a checkpoint's tensors as the parameters of the native decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvgen.backends.adapted import Adapted
from kvgen.backends.compute import ComputeOptions
from kvgen.checkpoint.gguf_blocks import StoredBlocks
from kvgen.checkpoint.grouped import Grouped, quantized, stacked
from kvgen.errors import CheckpointError, UnsupportedError, in_one_line
from kvgen.families.family import OfColumns, parts_of, split_fused, transform_of
from kvgen.kernels.memory import WeightMemory
from kvgen.kernels.packed import PackedMatrix
from kvgen.model.layers import Linear
from kvgen.model.moe import RouterModule, StackedLinear
from kvgen.system import total_memory

_SMALL = 1 << 20  # bytes up to which parameters are copied; as views, each would keep that much of the file in memory


class WeightReader:
    """Reads the tensors of a checkpoint as the decoder's parameters."""

    def __init__(self, adapted: Adapted, options: ComputeOptions) -> None:
        self.raw, self.changes, self.options = adapted.raw, adapted.changes, options
        blueprint = adapted.blueprint
        self.sources = blueprint.sources
        self.config = blueprint.decoder.config
        self.shapes = {name: tuple(parameter.shape) for name, parameter in blueprint.decoder.named_parameters()}
        self.transforms = blueprint.family.transforms(self.raw, self.config)
        modules = list(blueprint.decoder.named_modules())
        linear = (name for name, module in modules if isinstance(module, Linear | StackedLinear))
        self.matrices = {f"{name}.weight" for name in (*linear, "token_embd")}
        self.memory = WeightMemory()
        self.routers = {f"{name}.weight" for name, module in modules if isinstance(module, RouterModule)}  # stay floats

    def check_memory(self) -> None:
        """Raise UnsupportedError if the weights need more than the machine's memory."""
        needed, total = sum(map(self._bytes_of, self.sources)), total_memory()
        if self.options.device.type == "cpu" and needed > total:
            raise UnsupportedError(
                f"{self.raw.path}: the weights need {needed / 1e9:.1f} GB, but this machine has {total / 1e9:.1f} GB; "
                "use fewer bits: --quantize int4, or --dtype bfloat16"
            )

    def _bytes_of(self, source: str) -> int:
        """An upper bound."""
        stored = sum(self.raw.tensors[name].nbytes for name in self.sources[source])
        numbers = sum(math.prod(self.shapes[name]) for name in parts_of(source))
        if not self.options.kernels:
            return numbers * self.options.dtype.itemsize
        if self._is_changed(source) or any(self.raw.tensors[name].expands for name in self.sources[source]):
            stored = 4 * numbers
        return {"auto": stored, "none": 4 * numbers}.get(self.options.quantize, numbers)

    def read(self, source: str) -> list[tuple[str, Any]]:
        """Return (name, parameter) for each parameter in a source: tensors, or packed matrices for the kernels."""
        names = self.sources[source]
        where = f"{self.raw.path}: tensor {names[0]!r}"
        try:
            pieces: Sequence[Tensor | Grouped | StoredBlocks] = self._read_integers(source) or self._read_floats(source)
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{where} {self._misfit(source, error)}") from error
        parameters = []
        for name, piece in zip(parts_of(source), pieces, strict=True):
            if tuple(piece.shape) != self.shapes[name]:
                raise CheckpointError(f"{where} has the shape {tuple(piece.shape)}, not {self.shapes[name]}")
            change = self.changes.get(name)
            changed = change(piece) if change and isinstance(piece, Tensor) else piece
            parameters.append((name, self._convert(name, changed, partial(self._release, names))))
        kept = {parameter.data_ptr() for _, parameter in parameters if isinstance(parameter, Tensor)}
        if kept.isdisjoint(piece.data_ptr() for piece in pieces if isinstance(piece, Tensor)):
            self._release(names)  # no parameter uses the file's memory
        return parameters

    def _misfit(self, source: str, error: Exception) -> str:
        """Describe a source that cannot be divided into its parameters, or whose rows cannot be reordered."""
        shapes = [self.raw.tensors[name].shape for name in self.sources[source]]
        wanted = [self.shapes[name] for name in parts_of(source)]
        if sum(map(math.prod, shapes)) == sum(map(math.prod, wanted)):
            return f"does not fit the config ({in_one_line(error)})"
        link = "which does not divide into" if len(wanted) > 1 else "not"
        return f"has the shape {shapes[0]}, {link} {', '.join(map(str, wanted))}"

    def _release(self, names: Iterable[str]) -> None:
        for name in names:
            self.raw.tensors[name].release()

    def _read_integers(self, source: str) -> list[Grouped | StoredBlocks] | None:
        """Read quantized weights as stored; None if they are not, or cannot or should not be kept."""
        names = self.sources[source]
        if self.options.quantize == "none" or not self.options.kernels:
            return None
        if not self.matrices.issuperset(parts_of(source)) or self._is_changed(source):
            return None
        grouped = self._read_grouped(source)
        if grouped is None:
            return None
        transform = transform_of(self.transforms, source)
        if transform is None and len(parts_of(source)) == 1:
            return [grouped]
        if isinstance(transform, OfColumns):
            whole = grouped.whole() if isinstance(grouped, StoredBlocks) else grouped
            moved = whole.columns(transform.rows(torch.arange(grouped.shape[-1])[:, None]).squeeze(1))
            return None if moved is None else [moved]
        rows = grouped.shape[:-1]
        numbers = torch.arange(math.prod(rows), dtype=torch.float64)
        index = numbers.view(*rows, 1)
        index = index.transpose(-1, -2) if self.raw.tensors[names[0]].transposed else index
        order = transform(index) if transform else index
        if order.shape != (*rows, 1) or not torch.equal(order.flatten().sort().values, numbers):
            return None  # the transform does more than reorder rows
        return [grouped.rows(piece.squeeze(-1).long()) for piece in split_fused(order, source, self.config)]

    def _read_grouped(self, source: str) -> Grouped | StoredBlocks | None:
        """Read the codes of a source as they are stored; None if one of its tensors has none."""
        names = self.sources[source]
        first = self.raw.tensors[names[0]].read_grouped()
        if first is None or not self._is_stacked(source, first.shape):
            return first
        parts = [first, *(self.raw.tensors[name].read_grouped() for name in names[1:])]
        whole = [part.whole() if isinstance(part, StoredBlocks) else part for part in parts if part is not None]
        return stacked(whole) if len(whole) == len(names) else None

    def _is_stacked(self, source: str, shape: Sequence[int]) -> bool:
        """Whether a source consists of several tensors of this shape, or of one of a single expert."""
        alone = ".experts." in source and len(shape) < len(self.shapes[parts_of(source)[0]])
        return alone or len(self.sources[source]) > 1

    def _is_changed(self, source: str) -> bool:
        return not self.changes.keys().isdisjoint(parts_of(source))

    def _read_floats(self, source: str) -> list[Tensor]:
        names = self.sources[source]
        tensor = self._read_float(names[0])
        if self._is_stacked(source, tensor.shape):  # one after another, so that only one of them is in memory twice
            dtype = tensor.dtype if self.options.kernels else self.options.dtype
            whole = tensor.new_empty((len(names), *tensor.shape), dtype=dtype)
            for i, name in enumerate(names):
                whole[i] = self._read_float(name)
                self.raw.tensors[name].release()
            tensor = whole
        transform = transform_of(self.transforms, source)
        return split_fused(transform(tensor) if transform else tensor, source, self.config)

    def _read_float(self, name: str) -> Tensor:
        tensor = self.raw.tensors[name].read()
        if not tensor.is_floating_point() or tensor.itemsize < 2:  # FP8 has scales, which are not stored
            raise UnsupportedError(f"{self.raw.path}: tensor {name!r} has the type {self.raw.tensors[name].type}")
        return tensor

    def _convert(
        self, name: str, piece: Tensor | Grouped | StoredBlocks, release: Callable[[], None]
    ) -> Tensor | PackedMatrix:
        options, is_matrix = self.options, name in self.matrices
        bits = {"int8": 8, "int4": 4}.get(options.quantize)
        if bits is not None and is_matrix and isinstance(piece, Tensor) and piece.shape[-1] % 32 == 0:  # whole groups
            piece = quantized(piece, bits)
        if options.kernels and (is_matrix or name in self.routers):
            return PackedMatrix(piece, release, self.memory)
        assert not isinstance(piece, StoredBlocks)
        floats = piece.dequantized() if isinstance(piece, Grouped) else piece
        floats = floats.to(device=options.device, dtype=options.dtype)
        if floats.nbytes < _SMALL:
            return floats.clone(memory_format=torch.contiguous_format)
        return floats.contiguous() if options.kernels else floats
