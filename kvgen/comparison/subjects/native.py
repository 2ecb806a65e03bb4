"""kvgen's own decoder under comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgen.backends.native import NativeBackend
from kvgen.comparison.subjects.subject import Subject
from kvgen.comparison.subjects.widened import widened
from kvgen.model.cache import KVCache
from kvgen.model.decoder import Decoder


class NativeSubject(Subject):
    """Switches the guard of the cache off where a pattern wants it."""

    def __init__(self, backend: NativeBackend) -> None:
        super().__init__(backend)
        self._decoder, self.module = backend.decoder, backend.module
        config = backend.decoder.config
        long = {rotary.short_length + 1 for rotary in config.rotaries if rotary.long_frequencies}
        self.changes_at = tuple(sorted(long | {window for window in config.windows if window}))

    def trusting(self, new: Tensor, cache: KVCache | None = None) -> tuple[Tensor, KVCache]:
        """What a cache does that does not know its text: positions restart at 0."""
        return self._decoder.append(new, cache, start=0)

    def placed(self, ids: Tensor, cache: KVCache | None, positions: Tensor) -> tuple[Tensor, KVCache]:
        """Keys are cached as they were rotated, so only the positions of what is new can be chosen."""
        known = 0 if cache is None else cache.length
        return self._decoder.append(ids[:, known:], cache, start=int(positions[known]))

    def in_wider(self, dtype: torch.dtype) -> NativeSubject | None:
        """None on the kernels, where equal texts give equal bits and nothing is left to be sharper about."""
        if not isinstance(self._decoder, Decoder):
            return None
        twin: Decoder = widened(self._decoder, dtype)
        twin.kv_dtype = None
        return NativeSubject(NativeBackend(twin))
