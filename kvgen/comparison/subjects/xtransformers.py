"""An x-transformers model as the subject of a comparison."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kvgen.backends.xtransformers import XTransformersBackend, XTransformersCache
from kvgen.comparison.subjects.subject import Subject


class XTransformersSubject(Subject):
    """Calls the library with its defaults, and with explicit positions."""

    def __init__(self, backend: XTransformersBackend) -> None:
        super().__init__(backend)
        self._backend, self.module = backend, backend.module
        self.cannot_cache = backend.cannot_cache

    @torch.no_grad()
    def library_default(self, ids: Tensor, cache: XTransformersCache | None = None) -> tuple[Tensor, Any]:
        """The library's default call: of several new positions it computes only the last."""
        self._backend.check(ids)
        known = None if cache is None else cache.intermediates
        logits, intermediates = self._backend.module(ids, cache=known, return_intermediates=True)
        reused = 0 if known is None else known.cache_length
        return logits, XTransformersCache(intermediates, ids, reused, intermediates.cache_length - reused)

    def append_unchecked(self, new: Tensor, cache: XTransformersCache | None = None) -> tuple[Tensor, Any]:
        """The same call with a slice: the library then counts positions from the length of the slice."""
        return self.library_default(new, cache)

    @torch.no_grad()
    def with_positions(self, ids: Tensor, cache: XTransformersCache | None, positions: Tensor) -> tuple[Tensor, Any]:
        """Keys are cached before rotation, so all positions can be chosen."""
        return self._backend.call(ids, cache, pos=positions)

    def in_dtype(self, dtype: torch.dtype) -> XTransformersSubject | None:
        """Built anew: with tied embeddings, a deep copy's head would still read the original's embeddings."""
        first = self._backend
        net = copy.deepcopy(first.module) if first.rebuild is None else first.rebuild()
        net.load_state_dict(first.module.state_dict())
        twin = XTransformersBackend(net.to(device=first.device, dtype=dtype))
        try:
            logits, _ = twin(torch.zeros(1, 1, dtype=torch.int64, device=first.device), None)
        except RuntimeError:  # a part of it requires another dtype
            return None
        return XTransformersSubject(twin) if logits.dtype == dtype else None
