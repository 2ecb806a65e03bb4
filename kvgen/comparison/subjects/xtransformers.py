"""A model of the x-transformers library under comparison."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kvgen.backends.xtransformers import XTransformersBackend, XTransformersCache
from kvgen.comparison.subjects.subject import Subject


class XTransformersSubject(Subject):
    """Calls the library as its own defaults do, and with chosen positions."""

    def __init__(self, backend: XTransformersBackend) -> None:
        super().__init__(backend)
        self._backend, self.module = backend, backend.module
        self.cannot_cache = backend.cannot_cache

    @torch.no_grad()
    def by_default(self, ids: Tensor, cache: XTransformersCache | None = None) -> tuple[Tensor, Any]:
        """The library's own call with its defaults: of several new positions it computes the last alone."""
        self._backend.check(ids)
        known = None if cache is None else cache.intermediates
        logits, intermediates = self._backend.module(ids, cache=known, return_intermediates=True)
        reused = 0 if known is None else known.cache_length
        return logits, XTransformersCache(intermediates, ids, reused, intermediates.cache_length - reused)

    def trusting(self, new: Tensor, cache: XTransformersCache | None = None) -> tuple[Tensor, Any]:
        """The same call, handed a slice: positions are then counted from the length of the slice."""
        return self.by_default(new, cache)

    @torch.no_grad()
    def placed(self, ids: Tensor, cache: XTransformersCache | None, positions: Tensor) -> tuple[Tensor, Any]:
        """Keys are cached before they are rotated, so the positions of all of them can be chosen."""
        return self._backend.call(ids, cache, pos=positions)

    def in_wider(self, dtype: torch.dtype) -> XTransformersSubject | None:
        """A copy, built anew: with tied embeddings a deep copy's head still reads the first one's."""
        first = self._backend
        net = copy.deepcopy(first.module) if first.rebuild is None else first.rebuild()
        net.load_state_dict(first.module.state_dict())
        twin = XTransformersBackend(net.to(device=first.device, dtype=dtype))
        try:
            logits, _ = twin(torch.zeros(1, 1, dtype=torch.int64, device=first.device), None)
        except RuntimeError:  # a part of it insists on another dtype
            return None
        return XTransformersSubject(twin) if logits.dtype == dtype else None
