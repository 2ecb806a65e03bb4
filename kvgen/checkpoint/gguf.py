"""GGUF files: a reader that maps the file and looks at nothing but its header.

The format is specified in ggml's docs/gguf.md. The `gguf` package supplies the type tables and the
dequantization; its own reader makes an object of every vocabulary entry and takes seconds where this one
takes a tenth.
"""

from __future__ import annotations

import math
import struct
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from torch import Tensor

from kvgen.checkpoint.digest import source_file
from kvgen.checkpoint.grouped import Grouped, read_blocks
from kvgen.checkpoint.mapped import MappedFile
from kvgen.checkpoint.raw import RawCheckpoint, RawTensor, check_file
from kvgen.errors import CheckpointError, UnsupportedError

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_ARRAY_DEPTH = 4
_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}
_PLAIN_TYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_INTEGER_TYPES = {
    GGMLQuantizationType.I8,
    GGMLQuantizationType.I16,
    GGMLQuantizationType.I32,
    GGMLQuantizationType.I64,
}


def is_gguf(path: Path) -> bool:
    """Whether the file at `path` starts like a GGUF file. Raises CheckpointError if it cannot be opened."""
    check_file(path)
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def read(path: Path) -> RawCheckpoint:
    """Read the header of a GGUF file and map its tensors.

    Raises CheckpointError for a damaged file, UnsupportedError for a version or type that cannot be read.
    """
    return _Header(path, MappedFile(path)).parse()


class _Header:
    """One pass over a header. Every count is held against the bytes that are left before it is believed."""

    def __init__(self, path: Path, file: MappedFile) -> None:
        self.path = path
        self.source = source_file(path)
        self.file = file
        self.data = file.data
        self.offset = 0

    def parse(self) -> RawCheckpoint:
        if self.take(4) != _MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file")
        version = self.unpack("<I")
        if version & 0xFFFF == 0:
            raise UnsupportedError(f"{self.path}: a big-endian GGUF file; convert it to little-endian")
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are)")
        tensor_count, pair_count = self.unpack("<Q"), self.unpack("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata:
                self.fail(f"the key {key!r} occurs twice")
            metadata[key] = self.value(self.value_type())
        if metadata.get("split.count", 0) not in (0, 1):
            raise UnsupportedError(f"{self.path}: one of several split files; merge them with gguf-split --merge")
        return RawCheckpoint(self.path, "gguf", metadata, self.tensors(tensor_count, metadata), (self.source,))

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: damaged GGUF header at byte {self.offset}: {what}")

    def take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self.data):
            self.fail(f"{count} bytes wanted, {len(self.data) - self.offset} left")
        taken = self.data[self.offset : end]
        self.offset = end
        return taken

    def unpack(self, layout: str) -> int:
        number: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return number

    def string(self) -> str:
        return self.text(self.take(self.unpack("<Q")))

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: damaged GGUF header: text is not UTF-8 ({raw[:40]!r})") from None

    def value_type(self) -> GGUFValueType:
        number = self.unpack("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise CheckpointError(f"{self.path}: damaged GGUF header: unknown value type {number}") from None

    def value(self, kind: GGUFValueType, depth: int = 0) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return np.frombuffer(self.take(_SCALARS[kind].itemsize), _SCALARS[kind])[0].item()
        if depth == _MAX_ARRAY_DEPTH:
            self.fail("arrays are nested too deeply")
        item, count = self.value_type(), self.unpack("<Q")
        if item == GGUFValueType.STRING:
            return self.strings(count)
        if item == GGUFValueType.ARRAY:
            if count > len(self.data) - self.offset:
                self.fail(f"an array of {count} arrays does not fit into the file")
            return [self.value(item, depth + 1) for _ in range(count)]
        return np.frombuffer(self.take(count * _SCALARS[item].itemsize), _SCALARS[item]).tolist()

    def strings(self, count: int) -> list[str]:
        """An array of strings. A vocabulary has hundreds of thousands, so this loop is kept bare."""
        data, offset, size = self.data, self.offset, len(self.data)
        if count > (size - offset) // 8:
            self.fail(f"an array of {count} strings does not fit into the file")
        unpack = struct.Struct("<Q").unpack_from
        raw = []
        for _ in range(count):
            if offset + 8 > size:
                self.fail("an array of strings runs past the end of the file")
            start = offset + 8
            offset = start + unpack(data, offset)[0]
            if offset > size:
                self.fail("a string runs past the end of the file")
            raw.append(data[start:offset])
        self.offset = offset
        return [self.text(item) for item in raw]

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, RawTensor]:
        infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(count):
            name = self.string()
            if name in infos:
                self.fail(f"the tensor {name!r} occurs twice")
            dims = self.unpack("<I")
            if not 0 < dims <= _MAX_DIMS:
                self.fail(f"the tensor {name!r} has {dims} dimensions")
            shape = tuple(self.unpack("<Q") for _ in range(dims))[::-1]
            kind = self.unpack("<I")
            try:
                infos[name] = (shape, GGMLQuantizationType(kind), self.unpack("<Q"))
            except ValueError:
                raise UnsupportedError(f"{self.path}: tensor {name!r} has the unknown type {kind}") from None
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}, not a power of two from 8")
        start = -(-self.offset // alignment) * alignment
        tensors = {}
        end_of_previous, previous = 0, ""
        for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            if offset % alignment or offset < end_of_previous:
                self.fail(f"the data of tensor {name!r} is misaligned or overlaps that of {previous!r}")
            tensor, size = self.tensor(name, shape, kind, start + offset)
            end_of_previous, previous = offset + size, name
            tensors[name] = tensor
        return tensors

    def tensor(
        self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
    ) -> tuple[RawTensor, int]:
        """The tensor whose data starts at byte `offset` of the file, and the bytes that it takes."""
        if kind in _INTEGER_TYPES:
            raise UnsupportedError(f"{self.path}: tensor {name!r} has the integer type {kind.name}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            self.fail(f"the tensor {name!r} of shape {shape} does not divide into blocks of {kind.name}")
        size = math.prod(shape) // block * block_bytes
        if offset + size > len(self.data):
            raise CheckpointError(f"{self.path}: cut short: the data of tensor {name!r} runs past its end")
        read_tensor = partial(_read_tensor, self.path, self.file, shape, kind, offset, size)
        read_grouped = partial(_read_grouped, self.file, shape, kind, offset, size)
        release = partial(self.file.release, offset, size)
        return RawTensor(shape, kind.name, size, read_tensor, release, read_grouped), size


def _read_tensor(
    path: Path, file: MappedFile, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, size: int
) -> Tensor:
    if kind in _PLAIN_TYPES:
        return file.tensor(_PLAIN_TYPES[kind], math.prod(shape), offset).view(shape)
    # Rows are whole blocks, so their number does not matter. The package works on groups of 16; these rows are
    # long enough for numpy, and groups short enough for the processor's cache.
    _, block_bytes = GGML_QUANT_SIZES[kind]
    rows = math.gcd(size // block_bytes, 256)
    blocks = np.frombuffer(file.data, np.uint8, size, offset).reshape(rows, -1)
    try:
        return torch.from_numpy(dequantize(blocks, kind)).view(shape)
    except NotImplementedError as error:
        raise UnsupportedError(f"{path}: the quantization type {kind.name} cannot be read yet") from error


def _read_grouped(
    file: MappedFile, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, size: int
) -> Grouped | None:
    if len(shape) != 2 or kind in _PLAIN_TYPES:
        return None
    blocks = np.frombuffer(file.data, np.uint8, size, offset).reshape(-1, GGML_QUANT_SIZES[kind][1])
    return read_blocks(kind.name, blocks, shape[0])
