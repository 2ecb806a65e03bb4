"""The decoder on the C++ kernels, for CPUs in fp32: the contract and cache of `kvgen.model.decoder`."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvgen.errors import UsageError
from kvgen.kernels import structs
from kvgen.kernels.build import library
from kvgen.kernels.packed import PackedMatrix
from kvgen.kernels.program import ProgramBuilder
from kvgen.kernels.slots import Slot, slot_widths
from kvgen.model.cache import KVCache
from kvgen.model.causal_lm import CausalLM
from kvgen.model.config import DecoderConfig
from kvgen.model.layers import RotaryTables
from kvgen.model.mixers import Attention
from kvgen.model.spans import Span, positions_of
from kvgen.model.states import KeyValues

_LOCK = threading.Lock()  # runs share scratch memory


def _after_fork() -> None:
    global _LOCK
    _LOCK = threading.Lock()  # the thread that held it does not exist in the child
    torch.set_num_threads(1)  # nor do torch's threads, which it would wait for


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_STORED_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_LayerArray = ctypes.Array[structs.Layer]


class KernelDecoder(CausalLM):
    """A decoder that keeps weights in the checkpoint's type and computes in fp32.

    weights: packed matrices, and fp32 vectors and position embeddings, by `Decoder`'s parameter names.
    Raises UnsupportedError if the kernels cannot be built.
    """

    dtype = torch.float32

    def __init__(self, config: DecoderConfig, weights: Mapping[str, PackedMatrix | Tensor]) -> None:
        self.config, self.weights = config, weights
        self.rotaries = [RotaryTables(rotary) for rotary in config.rotaries]
        self._library = library()
        self._layers: WeakKeyDictionary[KVCache, tuple[Sequence[KeyValues], list[_LayerArray]]] = WeakKeyDictionary()
        body, head = ProgramBuilder(config, weights), ProgramBuilder(config, weights)
        for i in range(len(config.layers)):
            body.block(i)
        head.head()
        self._routers = body.routers  # the operations point to them
        self._body, self._head = ((structs.Op * len(part.ops))(*part.ops) for part in (body, head))
        self._widths = (ctypes.c_int32 * len(Slot))(*slot_widths(config))
        self._slots = (ctypes.c_void_p * len(Slot))()
        self._scratch = torch.empty(0)

    def extend(self, spans: Sequence[Span]) -> Tensor:
        positions = positions_of(spans)
        x = self.embed(spans, positions)  # (rows, dim), overwritten by the run
        rotations = self.rotations(spans, positions)  # must outlive the run
        tables = [structs.Table(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in rotations]
        sequences: list[structs.Sequence] = []
        row = 0
        for span in spans:
            for layers in self._reserve(span):
                sequences.append(structs.Sequence(layers, span.cache.length, row, span.new.shape[1]))
                row += span.new.shape[1]
        self._run(self._body, x, None, sequences, tables)
        for span in spans:
            span.cache.advance(span.new)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        logits = torch.empty(len(hidden), self.config.vocab_size)
        self._run(self._head, hidden.contiguous(), logits)
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

    def _reserve(self, span: Span) -> list[_LayerArray]:
        """Make room in the cache of a span; return the buffers of all layers for each batch row."""
        reserved = span.cache.reserve(span.new.shape[1])
        known = self._layers.get(span.cache)
        if known is None or known[0] is not reserved:
            rows = [self._layer_array(reserved, row) for row in range(span.new.shape[0])]
            known = self._layers[span.cache] = reserved, rows
        return known[1]

    def _layer_array(self, reserved: Sequence[KeyValues], row: int) -> _LayerArray:
        layers = (structs.Layer * len(reserved))()
        for i, (buffers, layer) in enumerate(zip(reserved, self.config.layers, strict=True)):
            keys, values = buffers.keys, buffers.values
            assert isinstance(layer.mixer, Attention)
            layers[i] = structs.Layer(
                *(keys[row].data_ptr(), values[row].data_ptr(), keys.stride(1), values.stride(1)),
                *(buffers.first, layer.mixer.window or 0, _STORED_TYPES[keys.dtype]),
            )
        return layers

    def _run(
        self,
        ops: ctypes.Array[structs.Op],
        x: Tensor,
        logits: Tensor | None,
        sequences: Sequence[structs.Sequence] = (),
        tables: Sequence[structs.Table] = (),
    ) -> None:
        rows = len(x)
        needed = rows * sum(self._widths[Slot.NORMED : Slot.LOGITS])
        with _LOCK:
            if not needed <= self._scratch.numel() <= 4 * needed:  # release the memory of long prompts
                self._scratch = torch.empty(needed)
            self._slots[Slot.X], at = x.data_ptr(), self._scratch.data_ptr()
            for slot in range(Slot.NORMED, Slot.LOGITS):
                self._slots[slot] = at
                at += rows * self._widths[slot] * 4
            self._slots[Slot.LOGITS] = None if logits is None else logits.data_ptr()
            run = structs.Run(
                ops=ops,
                slots=self._slots,
                widths=self._widths,
                sequences=(structs.Sequence * len(sequences))(*sequences),
                tables=(structs.Table * len(tables))(*tables),
                count=len(ops),
                rows=rows,
                sequence_count=len(sequences),
            )
            self._library.kvgen_run(ctypes.byref(run), torch.get_num_threads())
