"""llama.cpp's C interface: a model, a context in which sequences are decoded, and a sequence in it."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
import torch
from torch import Tensor

from kvgen.errors import ContextError, UnsupportedError
from kvgen.generation.batch import common_prefix

MAX_SEQUENCES, MAX_POSITIONS = 12, 2304  # of a context, and of each sequence: the memory for all is taken at once
CHUNK = 512  # positions computed at once: n_ubatch, the library's default
_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h
_words: list[str] = []  # errors since the last call that could fail


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        _words.append(text.decode("utf-8", "replace").strip().partition("\n")[0])


lib.llama_log_set(_log, None)


def refused(what: str) -> UnsupportedError:
    return UnsupportedError(f"llama.cpp {what}: {_words[0] if _words else 'it gives no reason'}")


class Model:
    """narrow: whether a tensor is not float32; products then round activations too."""

    def __init__(self, path: Path, *, narrow: bool) -> None:
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        _words.clear()
        self.pointer = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise refused(f"cannot load {path}")
        weakref.finalize(self, lib.llama_model_free, self.pointer)
        self.narrow, self.window = narrow, lib.llama_model_n_swa(self.pointer)
        self._vocab = lib.llama_model_get_vocab(self.pointer)
        self.vocab_size = lib.llama_vocab_n_tokens(self._vocab)
        self.positions = min(lib.llama_model_n_ctx_train(self.pointer), MAX_POSITIONS)

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        data = text.encode()
        tokens = (lib.llama_token * (len(data) + 8))()  # at most one a byte, a space in front, BOS and EOS
        count = lib.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), True, parse_special)
        return list(tokens[:count])


class Context:
    def __init__(self, model: Model, settings: dict[str, Any], sequences: int) -> None:
        params, threads, size = lib.llama_context_default_params(), torch.get_num_threads(), sequences * model.positions
        sizes = {"n_ctx": size, "n_batch": size, "n_ubatch": CHUNK, "n_seq_max": sequences}
        for name, value in {**sizes, **settings, "n_threads": threads, "n_threads_batch": threads}.items():
            setattr(params, name, value)
        _words.clear()
        self.pointer = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise refused("refuses these options")
        weakref.finalize(self, lib.llama_free, self.pointer)
        self.model, self.memory, self.unused = model, lib.llama_get_memory(self.pointer), list(range(sequences))

    def decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> Tensor:
        """Logits of the wanted rows, (m, vocab). A row is a token, its position and its sequence, and if wanted."""
        longest = 1 + max(position for _, position, _, _ in rows)
        if longest > self.model.positions:  # the library may abort
            raise ContextError(f"the text has {longest} positions; this context has {self.model.positions}")
        batch = lib.llama_batch_init(len(rows), 0, 1)
        try:
            for i, (token, position, sequence, wanted) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.n_tokens = len(rows)
            _words.clear()
            if code := lib.llama_decode(self.pointer, batch):
                raise refused(f"returns {code} from llama_decode")
        finally:
            lib.llama_batch_free(batch)
        found = [lib.llama_get_logits_ith(self.pointer, i) for i, (*_, wanted) in enumerate(rows) if wanted]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.model.vocab_size,)) for row in found]))

    def uncached(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits after `positions` from one pass over the whole text in a cleared context, (m, vocab)."""
        lib.llama_memory_clear(self.memory, True)
        return self.decode([(token, i, 0, i in positions) for i, token in enumerate(ids)])


class CachedSequence:
    """A sequence of a context: its ids so far. Its number is free again when this object is gone."""

    def __init__(self, context: Context) -> None:
        if not context.unused:
            gc.collect()  # a traceback may hold some
        if not context.unused:
            raise UnsupportedError(f"no more than {MAX_SEQUENCES} sequences are cached at once")
        self.context, self.number = context, context.unused.pop(0)
        weakref.finalize(self, context.unused.append, self.number)
        self.clear()

    def clear(self) -> None:
        lib.llama_memory_seq_rm(self.context.memory, self.number, -1, -1)
        self.ids: list[int] = []

    def keep(self, ids: list[int], most: int) -> int:
        """Remove what is not a prefix of the text, and return the length of what is left.

        What has left a window does not come back: then all is removed, by the rule of the library's server.
        """
        memory, window = self.context.memory, self.context.model.window
        length = min(common_prefix(self.ids, ids), most)
        if length < len(self.ids):
            first = lib.llama_memory_seq_pos_min(memory, self.number) if window else 0
            lost = first > 0 and first >= length - window
            if lost or not length or not lib.llama_memory_seq_rm(memory, self.number, length, -1):
                self.clear()
        return min(length, len(self.ids))

    def stored(self) -> CachedSequence:
        """Save the sequence, and load it into another."""
        pointer, other = self.context.pointer, CachedSequence(self.context)
        size = lib.llama_state_seq_get_size(pointer, self.number)
        state, other.ids = (ctypes.c_uint8 * size)(), self.ids
        lib.llama_state_seq_get_data(pointer, state, size, self.number)
        if not lib.llama_state_seq_set_data(pointer, state, size, other.number):
            raise refused("cannot load the state of this sequence")
        return other
