"""kvgen's decoder as the subject of a comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgen.backends.native import NativeBackend
from kvgen.comparison.subjects.subject import Subject
from kvgen.comparison.subjects.widened import widened
from kvgen.model.cache import KVCache
from kvgen.model.causal_lm import PREFILL_CHUNK
from kvgen.model.decoder import Decoder


class NativeSubject(Subject):
    """Can bypass the check that a cache belongs to its text."""

    def __init__(self, backend: NativeBackend) -> None:
        super().__init__(backend)
        self._backend = backend
        self._decoder, self.module = backend.decoder, backend.module
        config = backend.decoder.config
        long = {rotary.short_length + 1 for rotary in config.rotaries if rotary.long_frequencies}
        self.chunk_sizes = (PREFILL_CHUNK,)
        self.changes_at = tuple(sorted(long | {window for window in config.windows if window}))

    def append_unchecked(self, new: Tensor, cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """Like a cache that does not know its text: positions restart at 0."""
        return self._decoder.append(new, cache, start=0)

    def with_positions(self, ids: Tensor, cache: KVCache | None, positions: Tensor) -> tuple[Tensor, KVCache]:
        """Cached keys are already rotated, so only the positions of new tokens can be chosen."""
        known = 0 if cache is None else cache.length
        return self._decoder.append(ids[:, known:], cache, start=int(positions[known]))

    def stored(self, cache: KVCache) -> KVCache:
        """What a prompt cache keeps of it, restored."""
        layers = ({name: part.clone() for name, part in held.tensors.items()} for held in cache.held())
        return self._backend.restored(cache.tokens.clone(), layers, cache.variant)

    def in_dtype(self, dtype: torch.dtype) -> NativeSubject | None:
        """None on the kernels: they give equal bits for equal texts, so a wider dtype has nothing to decide."""
        if not isinstance(self.module, Decoder):
            return None
        twin: Decoder = widened(self.module, dtype)
        twin.kv_dtype = None
        return NativeSubject(NativeBackend(twin))
