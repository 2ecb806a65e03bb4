"""llama.cpp, through llama-cpp-python, on a GGUF file.

It is called as its server calls it: a step decodes what is new; the part of a text that has changed is removed from its
sequence, and what cannot be removed is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from kvgen.checkpoint import read_checkpoint
from kvgen.comparison.engines import EngineOptions
from kvgen.comparison.engines.llama_context import CHUNK, MAX_SEQUENCES, CachedSequence, Context, Model
from kvgen.comparison.subjects import Subject, subject_of
from kvgen.contract import Backend
from kvgen.errors import KvgenError, UnsupportedError
from kvgen.loading.load import Loaded
from kvgen.model.ids import check_form, check_range
from kvgen.tokenizer import Tokenizer, choose_tokenizer, read_tokenizer

# Fields of llama_context_params. By default a layer with a window keeps all positions, and sequences share no buffer.
_CACHES: dict[str, dict[str, Any]] = {
    "auto": {},
    "windowed": {"swa_full": False, "n_ubatch": 64},  # a window has room for as many positions besides
    "unified": {"kv_unified": True},
    "snapshots": {"n_rs_seq": 8},
}
_KV_DTYPES = {"auto": Type.F16, "bfloat16": Type.BF16, "int8": Type.Q8_0}
_ATTENTIONS = {
    "auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "flash": lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "eager": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


class _Cache:
    """A sequence for each row. reused, computed: positions of a row in the last call."""

    def __init__(self, sequences: list[CachedSequence]) -> None:
        self.sequences, self.reused, self.computed = sequences, 0, 0


class LlamaCppBackend(Backend):
    """A model with two contexts: one is cleared for each uncached pass, the other has the cached sequences.

    settings, cache: fields of llama_context_params, for both and for the cached sequences only.
    dtype: of the cache, and of attention in it.
    """

    name, device, dtype, rewinds, batches = "llama.cpp", torch.device("cpu"), torch.float16, True, True
    engine = f"llama-cpp-python {lib.__version__}"

    def __init__(self, model: Model, settings: dict[str, Any], cache: dict[str, Any]) -> None:
        self.model, self.settings, self.cache = model, settings, cache
        self._uncached, self._cached = Context(model, settings, 1), Context(model, settings | cache, MAX_SEQUENCES)
        self.snapshots: int = lib.llama_n_rs_seq(self._cached.pointer)
        self.vocab_size, self.context_length = model.vocab_size, model.positions

    def __call__(self, ids: Tensor, cache: _Cache | None = None, /) -> tuple[Tensor, _Cache]:
        check_form(ids)
        if cache is None or len(cache.sequences) != len(ids):
            cache = _Cache([CachedSequence(self._cached) for _ in ids])
        parts = [_Cache([sequence]) for sequence in cache.sequences]
        logits, _ = self.forward_batch([row[None] for row in ids], parts, [1] * len(ids))
        cache.reused, cache.computed = parts[0].reused, parts[0].computed
        return torch.stack(logits), cache

    def forward_batch(
        self, sequences: Sequence[Tensor], caches: Sequence[_Cache | None], counts: Sequence[int]
    ) -> tuple[list[Tensor], list[Any]]:
        known = [cache or _Cache([CachedSequence(self._cached)]) for cache in caches]
        rows = []
        for ids, cache, count in zip(sequences, known, counts, strict=True):
            check_range(ids, self.model.vocab_size)
            tokens, sequence = ids[0].tolist(), cache.sequences[0]
            n, start = len(tokens), sequence.keep(tokens, len(tokens) - count)
            cache.reused, cache.computed = start, n - start
            rows += [(tokens[i], i, sequence.number, i >= n - count) for i in range(start, n)]
            sequence.ids = tokens
        try:
            return list(torch.split(self._cached.decode(rows), list(counts))), known
        except KvgenError:
            for cache in known:
                cache.sequences[0].clear()
            raise

    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> Iterator[Tensor]:
        check_range(ids, self.model.vocab_size)
        yield self._uncached.uncached(ids[0].tolist(), positions)


class LlamaCppSubject(Subject):
    """Keeps uncached passes apart, takes slices, and saves and loads sequences."""

    def __init__(self, backend: LlamaCppBackend) -> None:
        super().__init__(backend)
        self._otherwise: Context | None = None
        self.chunk_sizes = (backend.cache.get("n_ubatch", CHUNK),)
        self._backend, self.changes_at = backend, (backend.model.window,) if backend.model.window else ()

    def uncached(self, ids: Tensor) -> Tensor:
        rows = (next(self._backend.each_logits(row[None], [ids.shape[1] - 1])) for row in ids)
        return torch.stack(list(rows))

    def append_unchecked(self, new: Tensor, cache: _Cache | None = None) -> tuple[Tensor, _Cache]:
        """The library's usual call: it counts positions from those in the sequence."""
        known = new.new_tensor([sequence.ids for sequence in cache.sequences] if cache else [[]] * len(new))
        return self(torch.cat((known, new), dim=1), cache)

    def stored(self, cache: _Cache) -> _Cache:
        return _Cache([sequence.stored() for sequence in cache.sequences])

    def rounded_otherwise(self, ids: Tensor) -> Tensor:
        """With the other implementation of attention. Where activations are rounded to 8 bits, its small differences
        grow as those between a pass and a step do."""
        if self._otherwise is None:
            settings = self._backend.settings
            eager = settings["flash_attn_type"] == _ATTENTIONS["eager"]
            other = {"flash_attn_type": _ATTENTIONS["flash" if eager else "eager"]}
            if settings["type_v"] == Type.Q8_0:  # which only flash attention reads
                other["type_v"] = Type.F16
            self._otherwise = Context(self._backend.model, settings | other, 1)
        return self._otherwise.uncached(ids[0].tolist(), [ids.shape[1] - 1])[0]

    def in_dtype(self, dtype: torch.dtype) -> LlamaCppSubject | None:
        """With a cache in float32, if the weights are so too."""
        backend = self._backend
        if dtype != torch.float32 or backend.model.narrow:
            return None
        wide = {"type_k": Type.F32, "type_v": Type.F32, "flash_attn_type": _ATTENTIONS["eager"]}
        twin = LlamaCppBackend(backend.model, backend.settings | wide, backend.cache)
        twin.dtype = dtype
        return LlamaCppSubject(twin)


class _Tokenizer(Tokenizer):
    """The library's: its ids of a text, where kvgen reads the vocabulary."""

    def __init__(self, vocabulary: Tokenizer, model: Model) -> None:
        super().__init__(vocabulary.backend, vocabulary.eos_ids)
        self._model = model

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return self._model.tokenize(text, parse_special=parse_special)


subject_of.register(LlamaCppBackend, LlamaCppSubject)


def load(path: Path, options: EngineOptions) -> Loaded:
    """Load a GGUF file. Raises UsageError for options that llama.cpp lacks, UnsupportedError for what it refuses."""
    options.check(
        "llama.cpp", cache=_CACHES, attention=_ATTENTIONS, kv_dtype=_KV_DTYPES, dtype=["auto"], device=["auto", "cpu"]
    )
    raw = read_checkpoint(path)
    if raw.format != "gguf":
        raise UnsupportedError(f"{path} is not a GGUF file, which llama.cpp needs")
    kv_type = _KV_DTYPES[options.kv_dtype]
    settings = {"type_k": kv_type, "type_v": kv_type, "flash_attn_type": _ATTENTIONS[options.attention]}
    model = Model(path, narrow=any(tensor.type != "F32" for tensor in raw.tensors.values()))
    backend = LlamaCppBackend(model, settings, _CACHES[options.cache])
    lacking = {"windowed": not model.window, "snapshots": not backend.snapshots}
    if lacking.get(options.cache):
        raise UnsupportedError(f"{path}: llama.cpp has no cache {options.cache!r} for this model")
    choice = options.tokenizer
    tokenizer = (
        _Tokenizer(read_tokenizer(raw), model) if choice is None else choose_tokenizer(str(choice), model.vocab_size)
    )
    return Loaded(backend, tokenizer, str(path), files=raw.files)
