"""Read GGUF files (ggml's docs/gguf.md): parse the header, map the tensors.

The `gguf` package supplies type tables and dequantization. Its reader takes seconds, because it creates an object for
each vocabulary entry; this one takes about 0.1 s.
"""

from __future__ import annotations

import math
import struct
from array import array
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from torch import Tensor

from kvgen.checkpoint.digest import source_file
from kvgen.checkpoint.gguf_blocks import StoredBlocks, in_groups
from kvgen.checkpoint.mapped import MappedFile
from kvgen.checkpoint.quantization import mxfp4
from kvgen.checkpoint.raw import RawCheckpoint, RawTensor, check_file
from kvgen.checkpoint.strings import Strings
from kvgen.errors import CheckpointError, UnsupportedError

_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_ARRAY_DEPTH = 4
_SCALARS = {  # UINT8 to uint8, ...
    kind: np.dtype(kind.name.lower()).newbyteorder("<")
    for kind in GGUFValueType
    if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY)
}
_PLAIN_TYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def read(path: Path) -> RawCheckpoint:
    """Read the header of a GGUF file and map its tensors.

    Raises CheckpointError if the file is damaged, UnsupportedError if it has another format, version or type.
    """
    check_file(path)
    return _Header(path).parse()


class _Header:
    """Parse a header in one pass. Each count is checked against the remaining bytes before it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = source_file(path)
        self.file = MappedFile(path)
        self.data = self.file.data
        self.offset = 0

    def parse(self) -> RawCheckpoint:
        if self.data[:4] != b"GGUF":
            raise UnsupportedError(f"{self.path}: not a GGUF file; give a .gguf file or a folder with config.json")
        self.offset = 4
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
            raise UnsupportedError(f"{self.path}: one of several split files; merge them with llama.cpp's gguf-split")
        return RawCheckpoint(self.path, "gguf", metadata, self.tensors(tensor_count, metadata), (self.source,))

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: damaged GGUF header at byte {self.offset}: {problem}")

    def take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self.data):
            self.fail(f"{count} bytes wanted, {len(self.data) - self.offset} left")
        start, self.offset = self.offset, end
        return self.data[start:end]

    def unpack(self, layout: str) -> int:
        number: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return number

    def string(self) -> str:
        return self.text(self.take(self.unpack("<Q")))

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"text is not UTF-8 ({raw[:40]!r})")

    def value_type(self) -> GGUFValueType:
        number = self.unpack("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            self.fail(f"unknown value type {number}")

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

    def strings(self, count: int) -> Strings:
        """Read an array of strings. A vocabulary has hundreds of thousands, so the loop avoids method calls."""
        data, offset, size = self.data, self.offset, len(self.data)
        if count > (size - offset) // 8:
            self.fail(f"an array of {count} strings does not fit into the file")
        unpack = struct.Struct("<Q").unpack_from
        ends = array("q")
        for _ in range(count):
            if offset + 8 > size:
                self.fail("an array of strings runs past the end of the file")
            offset += 8 + unpack(data, offset)[0]
            if offset > size:
                self.fail("a string runs past the end of the file")
            ends.append(offset)
        stored = np.frombuffer(self.take(offset - self.offset), np.uint8)  # each behind its length
        bounds = np.concatenate(([0], np.array(ends, np.int64) - (offset - stored.size)))
        is_text = np.ones(stored.size, bool)
        is_text[(bounds[:-1, None] + np.arange(8)).ravel()] = False
        try:
            return Strings(stored[is_text].tobytes(), bounds - 8 * np.arange(count + 1))
        except UnicodeDecodeError as error:
            self.fail(f"text is not UTF-8 ({error.object[error.start :][:40]!r})")

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
        tensors: dict[str, RawTensor] = {}
        previous, previous_end = "", 0
        for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            if offset % alignment or offset < previous_end:
                self.fail(f"the data of tensor {name!r} is misaligned or overlaps that of {previous!r}")
            tensors[name] = self.tensor(name, shape, kind, start + offset)
            previous, previous_end = name, offset + tensors[name].nbytes
        return tensors

    def tensor(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int) -> RawTensor:
        """Describe the tensor at byte `offset` of the file."""
        if kind.name in ("I8", "I16", "I32", "I64"):
            raise UnsupportedError(f"{self.path}: tensor {name!r} has the integer type {kind.name}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            self.fail(f"the tensor {name!r} of shape {shape} does not divide into blocks of {kind.name}")
        size = math.prod(shape) // block * block_bytes
        if offset + size > len(self.data):
            raise CheckpointError(f"{self.path}: cut short: the data of tensor {name!r} runs past its end")
        read_tensor = partial(_read_tensor, self.path, self.file, shape, kind, offset, size)
        read_grouped = partial(_read_grouped, self.file, shape, kind, offset, size)
        return RawTensor(shape, kind.name, size, read_tensor, partial(self.file.release, offset, size), read_grouped)


def _read_tensor(
    path: Path, file: MappedFile, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, size: int
) -> Tensor:
    if kind in _PLAIN_TYPES:
        return file.tensor(_PLAIN_TYPES[kind], math.prod(shape), offset).view(shape)
    if kind == GGMLQuantizationType.MXFP4:  # to bf16, which is exact and half of the package's fp32
        stored = file.tensor(torch.uint8, size, offset).view(-1, GGML_QUANT_SIZES[kind][1])
        return mxfp4.dequantize(stored[:, 1:], stored[:, 0], halves=True).view(shape)
    # Any number of rows of whole blocks gives the same result. The package dequantizes 16 rows at a time: this many
    # make rows long enough for numpy and short enough for the CPU cache.
    _, block_bytes = GGML_QUANT_SIZES[kind]
    rows = math.gcd(size // block_bytes, 256)
    blocks = np.frombuffer(file.data, np.uint8, size, offset).reshape(rows, -1)
    try:
        return torch.from_numpy(dequantize(blocks, kind)).view(shape)
    except NotImplementedError as error:
        raise UnsupportedError(f"{path}: the quantization type {kind.name} is not supported") from error


def _read_grouped(
    file: MappedFile, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, size: int
) -> StoredBlocks | None:
    *rows, _ = shape
    if not rows or not in_groups(kind.name):
        return None
    order = np.arange(math.prod(rows)).reshape(rows)
    return StoredBlocks(kind.name, np.frombuffer(file.data, np.uint8, size, offset).reshape(order.size, -1), order)
