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
from kvgen.kernels.blocks import BlockWriter, write_head
from kvgen.kernels.build import library
from kvgen.kernels.packed import PackedMatrix
from kvgen.kernels.program import ProgramBuilder
from kvgen.kernels.slots import Buffer, Slot
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

_MAX_PRODUCTS = 500_000_000
"""Multiplications per thread in one call, as long as the operations divide equally: a tenth of a second or two."""
_STORED_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_LayerArray = ctypes.Array[structs.Layer]


class KernelDecoder(CausalLM):
    """A decoder that keeps weights in the checkpoint's type and computes in fp32.

    activation_bits: of the integers that activations are rounded to, to multiply integer weights: 16, or 8 (lossy). The
        head has 16: it costs little, and what it rounds shows in the logits.
    weights: packed matrices, and fp32 vectors and position embeddings, by `Decoder`'s parameter names.
    Raises UnsupportedError if the kernels cannot be built.
    """

    dtype = torch.float32
    activation_bits = 16

    def __init__(self, config: DecoderConfig, weights: Mapping[str, PackedMatrix | Tensor]) -> None:
        self.config, self.weights = config, weights
        self.rotaries = [RotaryTables(rotary) for rotary in config.rotaries]
        self._library = library()
        self._layers: WeakKeyDictionary[KVCache, tuple[Sequence[KeyValues], list[_LayerArray]]] = WeakKeyDictionary()
        self._attentions = [mixer for mixer in config.mixers if isinstance(mixer, Attention)]
        slots: dict[Slot, int] = {}
        body, head = (ProgramBuilder(config, weights, slots) for _ in range(2))
        blocks = BlockWriter(body)
        for i in range(len(config.layers)):
            blocks.write_block(i)
        write_head(head)
        self._kept = body.kept  # the operations point to it
        self._body, self._head = ((structs.Op * len(part.ops))(*part.ops) for part in (body, head))
        self._widths = (ctypes.c_int32 * len(slots))(*(slot.width for slot in slots))
        self._buffers = [slot.buffer for slot in slots]
        scratch = dict.fromkeys(buffer for buffer in self._buffers if buffer not in (Buffer.X, Buffer.LOGITS))
        self._sizes = {buffer: max(slot.width for slot in slots if slot.buffer == buffer) for buffer in scratch}
        self._slots = (ctypes.c_void_p * len(slots))()
        self._scratch = torch.empty(0)

    def extend(self, spans: Sequence[Span]) -> Tensor:
        positions = positions_of(spans)
        x = self.embed(spans, positions)  # (rows, dim), overwritten by the run
        rotations = self.rotations(spans, positions)  # must outlive the run
        tables = [structs.Table(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in rotations]
        sequences: list[structs.Sequence] = []
        row = 0
        for span in spans:
            past, new = span.cache.length, span.new.shape[1]
            for layers, (states, ends) in zip(self._reserve(span), _reserve_states(span), strict=True):
                sequences.append(structs.Sequence(layers, states, ends, past, row, new, len(ends)))
                row += new
        products = sum(span.rows * self.config.products_at(span.cache.length + span.new.shape[1]) for span in spans)
        self._run(self._body, x, None, sequences, tables, products)
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
        for i, (buffers, mixer) in enumerate(zip(reserved, self._attentions, strict=True)):
            keys, values = buffers.keys, buffers.values
            layers[i] = structs.Layer(
                *(keys[row].data_ptr(), values[row].data_ptr(), keys.stride(1), values.stride(1)),
                *(buffers.first, mixer.window or 0, _STORED_TYPES[keys.dtype]),
            )
        return layers

    def _run(
        self,
        ops: ctypes.Array[structs.Op],
        x: Tensor,
        logits: Tensor | None,
        sequences: Sequence[structs.Sequence] = (),
        tables: Sequence[structs.Table] = (),
        products: int = 0,
    ) -> None:
        """Run operations over x, (rows, dim). products: multiplications in all of them, roughly.

        Python handles signals only between calls, so a long run is divided into several.
        """
        rows, threads = len(x), torch.get_num_threads()
        calls = 1 + products // (_MAX_PRODUCTS * threads)
        count = -(-len(ops) // calls)
        needed = rows * sum(self._sizes.values())
        with _LOCK:
            if not needed <= self._scratch.numel() <= 4 * needed:  # release the memory of long prompts
                self._scratch = torch.empty(needed)
            memory: dict[Buffer, int | None] = {Buffer.X: x.data_ptr()}
            memory[Buffer.LOGITS] = None if logits is None else logits.data_ptr()
            at = self._scratch.data_ptr()
            for scratch, size in self._sizes.items():
                memory[scratch] = at
                at += rows * size * 4
            for slot, buffer in enumerate(self._buffers):
                self._slots[slot] = memory[buffer]
            run = structs.Run(
                slots=self._slots,
                widths=self._widths,
                sequences=(structs.Sequence * len(sequences))(*sequences),
                tables=(structs.Table * len(tables))(*tables),
                rows=rows,
                sequence_count=len(sequences),
                activation_bits=self.activation_bits if logits is None else 16,
            )
            for first in range(0, len(ops), count):
                run.ops, run.count = ctypes.pointer(ops[first]), min(count, len(ops) - first)
                self._library.kvgen_run(ctypes.byref(run), threads)


def _reserve_states(span: Span) -> list[tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int32]]]:
    """Make room for the states of recurrent mixers; return what `structs.Sequence` has of them, for each batch row."""
    batch, new = span.new.shape
    ends, states = span.cache.reserve_states(new)
    parts = [part for pieces in states for piece in pieces for part in (*piece, None)[: structs.STATE_PARTS]]
    starts = [0 if part is None else part.data_ptr() for part in parts]
    strides = [0 if part is None else part.nbytes // batch for part in parts]
    rows = ([at + row * stride for at, stride in zip(starts, strides, strict=True)] for row in range(batch))
    return [((ctypes.c_void_p * len(parts))(*row), (ctypes.c_int32 * len(ends))(*ends)) for row in rows]
