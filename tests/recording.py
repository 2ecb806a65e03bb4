"""Records what a `KernelDecoder` passes to the kernels, as a file that tests/replay.cpp runs on any processor.

The file is an image of memory, in which pointers are offsets, so that it needs neither Python nor torch to be run.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor, UntypedStorage

from kvgen.kernels.decoder import KernelDecoder
from kvgen.kernels.structs import STATE_PARTS, Op, OpKind, Run

_ALIGNMENT = 64
_KINDS = ("F32", "BF16", "F16", "INT4", "INT8", "CODED4", "INT5")  # of weights, as in structs.h


class Part(NamedTuple):
    """A part of the results of a replay: what an operation wrote to its slot, or the memory after a run."""

    name: str
    size: int


class Recorder:
    """Stands in for the library of a decoder: lets it compute, and keeps what it reads and what it leaves in memory.

    parts: what a replay writes. left: what the library itself left in memory after each run.
    """

    def __init__(self, decoder: KernelDecoder, storages: dict[int, UntypedStorage]) -> None:
        """storages: the memory of everything that the decoder points to, by address; see `noted_storages`."""
        self.parts: list[Part] = []
        self.left: list[bytes] = []
        self._library, self._storages = decoder._library, storages
        decoder._library = self  # type: ignore[assignment]
        self._image = bytearray(_ALIGNMENT)  # so that no offset is 0, which is null
        self._pointers: list[int] = []  # where there are some
        self._runs: list[int] = []  # the offset of each run, how many ranges of memory it may change, and these
        self._constants: dict[int, int] = {}  # offsets of what no run changes, by address
        self._changing: dict[int, int] = {}  # and of what the current one may change

    def kvgen_run(self, reference: Any, threads: int) -> None:
        run = reference._obj
        self._changing = {}
        offset = self._place(bytes(run))
        self._point(offset, run, self._counts(run), self._changing)
        ranges = [(at, self._storages[address].nbytes()) for address, at in self._changing.items()]
        self._runs += [offset, len(ranges), *(number for pair in ranges for number in pair)]
        self._library.kvgen_run(reference, threads)
        self.left.append(b"".join(_contents(self._storages[address]) for address in self._changing))
        for op in run.ops[: run.count]:
            self.parts.append(Part(_name(op), run.rows * run.widths[op.dst] * 4))
        self.parts.append(Part("memory", len(self.left[-1])))

    def write(self, path: Path) -> None:
        numbers = [len(self._pointers), *self._pointers, len(self.left), *self._runs]
        path.write_bytes(array("q", [len(self._image)]).tobytes() + self._image + array("q", numbers).tobytes())

    def _counts(self, run: Run) -> dict[str, int]:
        """How many items there are of what a run points to, by the names of pointers; one if not named here."""
        ops = run.ops[: run.count]
        slots = 1 + max(max(op.src, op.dst, op.other, op.third) for op in ops)
        tables = 1 + max((op.mode for op in ops if op.kind == OpKind.ROTATE), default=-1)
        layers = 1 + max((op.layer for op in ops if op.kind == OpKind.ATTEND), default=-1)
        recurrent = 1 + max(
            (op.layer for op in ops if op.kind in (OpKind.CONVOLVE, OpKind.SCAN, OpKind.DELTA)), default=-1
        )
        sizes = {"ops": run.count, "slots": slots, "widths": slots, "tables": tables, "layers": layers}
        return sizes | {"sequences": run.sequence_count, "states": recurrent * STATE_PARTS}

    def _point(self, offset: int, item: Any, counts: dict[str, int], placed: dict[int, int]) -> None:
        """Place what a struct points to, and let its copy at `offset` point to the copies."""
        if hasattr(item, "pieces"):
            counts = counts | {"ends": item.pieces, "states": counts["states"] * (item.pieces + 1)}
        for name, type_ in item._fields_:
            at, target = offset + getattr(type(item), name).offset, getattr(item, name)
            if type_ is ctypes.c_void_p:
                self._set(at, self._memory(target, placed))
            elif issubclass(type_, ctypes._Pointer) and target:
                memory = self._constants if name == "ops" else placed
                self._set(at, self._items(target, counts.get(name, 1), counts, memory))

    def _items(self, items: Any, count: int, counts: dict[str, int], placed: dict[int, int]) -> int:
        """Place an array of structs, addresses or numbers, and what it points to; return its offset."""
        address, size = ctypes.addressof(items.contents), ctypes.sizeof(items._type_)
        if placed is self._constants and address in placed:
            return placed[address]
        offset = self._place(ctypes.string_at(address, count * size))
        for i in range(count):
            if items._type_ is ctypes.c_void_p:
                self._set(offset + i * size, self._memory(items[i], placed))
            elif issubclass(items._type_, ctypes.Structure):
                self._point(offset + i * size, items[i], counts, placed)
        if placed is self._constants:
            placed[address] = offset
        return offset

    def _memory(self, address: int | None, placed: dict[int, int]) -> int:
        """Place the tensor that has an address, if it is not; return the offset of the address."""
        if not address:
            return 0
        start = next(at for at, memory in self._storages.items() if at <= address < at + memory.nbytes())
        if start not in placed:
            placed[start] = self._place(_contents(self._storages[start]))
        return placed[start] + address - start

    def _place(self, data: bytes) -> int:
        self._image += bytes(-len(self._image) % _ALIGNMENT)
        self._image += data
        return len(self._image) - len(data)

    def _set(self, at: int, offset: int) -> None:
        self._image[at : at + 8] = offset.to_bytes(8, "little")
        if offset:
            self._pointers.append(at)


@contextmanager
def noted_storages() -> Iterator[dict[int, UntypedStorage]]:
    """Collect the memory of all tensors whose addresses are asked for, by address, and keep it alive."""
    storages: dict[int, UntypedStorage] = {}
    original = Tensor.data_ptr

    def data_ptr(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage
        return original(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "data_ptr", data_ptr)
        yield storages


def differences(parts: list[Part], found: bytes, expected: bytes) -> dict[str, str]:
    """Return how many parts of each name differ between two replays, and how far at most in units in the last place."""
    assert len(found) == len(expected) == sum(part.size for part in parts)
    at, gaps = 0, defaultdict(list)
    for name, size in parts:
        one, other = (
            np.frombuffer(results[at : at + size].ljust(-(-size // 4) * 4), np.int32) for results in (found, expected)
        )
        gaps[name].append(int(np.abs(one.astype(np.int64) - other).max(initial=0)))
        at += size
    return {name: f"{np.count_nonzero(of)} of {len(of)}, by {max(of)} ulp" for name, of in gaps.items() if any(of)}


def _name(op: Op) -> str:
    name = OpKind(op.kind).name
    if op.kind == OpKind.LINEAR:
        weight = op.weight.contents
        return f"{name} {_KINDS[weight.kind]}" + (f", groups of {weight.group}" if weight.group else "")
    return f"{name} {op.mode}" if op.kind in (OpKind.ACTIVATE, OpKind.NORM) else name


def _contents(storage: UntypedStorage) -> bytes:
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())
