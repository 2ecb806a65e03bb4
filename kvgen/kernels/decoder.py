"""The decoder on the kernels: the same contract and the same cache as `kvgen.model.decoder`, for CPUs and fp32."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvgen.errors import UsageError
from kvgen.kernels.build import library
from kvgen.kernels.packed import PackedMatrix
from kvgen.kernels.program import Op, Programmer, Slot, slot_widths
from kvgen.model.cache import KVCache
from kvgen.model.causal_lm import CausalLM, Span, positions_of
from kvgen.model.config import DecoderConfig
from kvgen.model.layers import RotaryTables
from kvgen.model.states import KeyValues

_RUNNING = threading.Lock()  # scratch memory is kept from run to run


def _in_a_forked_process() -> None:
    global _RUNNING
    _RUNNING = threading.Lock()  # a thread that held it is not there
    torch.set_num_threads(1)  # torch would wait for threads of its own that are not there, either


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_forked_process)

_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class _Layer(ctypes.Structure):
    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("key_head", "value_head", "first", "window")),
        ("stored", ctypes.c_int32),
    )


class _Sequence(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("past", ctypes.c_int64),
        ("row", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
    )


class _Table(ctypes.Structure):
    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("rotated", ctypes.c_int32))


class _Run(ctypes.Structure):
    _fields_ = (
        ("ops", ctypes.POINTER(Op)),
        ("slots", ctypes.POINTER(ctypes.c_void_p)),
        ("widths", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(_Sequence)),
        ("tables", ctypes.POINTER(_Table)),
        ("slopes", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("sequence_count", ctypes.c_int32),
    )


@dataclass(frozen=True)
class _Place:
    """Buffers of a cache, and for each of its batch rows where they are."""

    rooms: Sequence[KeyValues]
    rows: Sequence[ctypes.Array[_Layer]]


class KernelDecoder(CausalLM):
    """A decoder whose weights stay in the checkpoint's own type, and whose arithmetic is fp32.

    weights: matrices packed, vectors and the table of learned positions in fp32, by `Decoder`'s names for them.
    Raises UnsupportedError where the kernels cannot be built.
    """

    dtype = torch.float32

    def __init__(self, config: DecoderConfig, weights: Mapping[str, PackedMatrix | Tensor]) -> None:
        self.config, self.weights = config, weights
        self.rotaries = [RotaryTables(rotary) for rotary in config.rotaries]
        self._library = library()
        self._slopes = torch.tensor(config.attention.alibi) if config.attention.alibi else None
        self._windows = [layer.mixer.window for layer in config.layers]
        self._places: WeakKeyDictionary[KVCache, _Place] = WeakKeyDictionary()
        body, head = Programmer(config, weights), Programmer(config, weights)
        for i in range(len(config.layers)):
            body.block(i)
        head.head()
        self._body, self._head = ((Op * len(part.ops))(*part.ops) for part in (body, head))
        widths = slot_widths(config)
        self._widths = (ctypes.c_int32 * len(Slot))(*(widths.get(slot, config.vocab_size) for slot in Slot))
        self._slots = (ctypes.c_void_p * len(Slot))()
        self._scratch = torch.empty(0)

    def extend(self, spans: Sequence[Span]) -> Tensor:
        positions = positions_of(spans)
        x = self.embed(spans, positions)  # (rows, dim), which the run overwrites
        tables = self.rotations(spans, positions)  # they must outlive the run
        rotations = [_Table(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in tables]
        sequences: list[_Sequence] = []
        row = 0
        for span in spans:
            for layers in self._place(span):
                sequences.append(_Sequence(layers, span.cache.length, row, span.new.shape[1]))
                row += span.new.shape[1]
        self._run(self._body, x, None, sequences, rotations)
        for span in spans:
            span.cache.advance(span.new)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self.config.vocab_size)
        self._run(self._head, hidden, logits)
        return logits

    def token_rows(self, ids: Tensor) -> Tensor:
        table = self.weights["token_embd.weight"]
        assert isinstance(table, PackedMatrix)
        if ids.device.type != "cpu":
            raise UsageError(f"token ids are on {ids.device}; this model computes on the CPU")
        return table.rows(ids)

    def position_rows(self, positions: Tensor) -> Tensor:
        table = self.weights["position_embd.weight"]
        assert isinstance(table, Tensor)
        return table[positions]

    def _place(self, span: Span) -> Sequence[ctypes.Array[_Layer]]:
        """Where keys and values of each layer go, for each batch row of a span."""
        batch, count = span.new.shape
        rooms = span.cache.reserve(count)
        place = self._places.get(span.cache)
        if place is None or place.rooms is not rooms:
            place = self._places[span.cache] = _Place(rooms, [self._layers(rooms, row) for row in range(batch)])
        return place.rows

    def _layers(self, rooms: Sequence[KeyValues], row: int) -> ctypes.Array[_Layer]:
        layers = (_Layer * len(rooms))()
        for layer, room, window in zip(layers, rooms, self._windows, strict=True):
            layer.keys, layer.values = room.keys[row].data_ptr(), room.values[row].data_ptr()
            layer.key_head, layer.value_head = room.keys.stride(1), room.values.stride(1)
            layer.first, layer.window, layer.stored = room.first, window or 0, _STORED[room.keys.dtype]
        return layers

    def _run(
        self,
        ops: ctypes.Array[Op],
        x: Tensor,
        logits: Tensor | None,
        sequences: Sequence[_Sequence] = (),
        tables: Sequence[_Table] = (),
    ) -> None:
        rows = len(x)
        needed = rows * sum(self._widths[Slot.NORMED : Slot.LOGITS])
        with _RUNNING:
            if not needed <= self._scratch.numel() <= 4 * needed:  # what a long prompt took is not kept for short steps
                self._scratch = torch.empty(needed)
            self._slots[Slot.X], at = x.data_ptr(), self._scratch.data_ptr()
            for slot in range(Slot.NORMED, Slot.LOGITS):
                self._slots[slot] = at
                at += rows * self._widths[slot] * 4
            self._slots[Slot.LOGITS] = None if logits is None else logits.data_ptr()
            run = _Run(
                ops=ops,
                slots=self._slots,
                widths=self._widths,
                sequences=(_Sequence * len(sequences))(*sequences),
                tables=(_Table * len(tables))(*tables),
                slopes=None if self._slopes is None else self._slopes.data_ptr(),
                count=len(ops),
                rows=rows,
                sequence_count=len(sequences),
            )
            self._library.kvgen_run(ctypes.byref(run), torch.get_num_threads())
