"""Check a cache during generation: recompute some steps uncached and compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvgen.comparison.reference import Reference
from kvgen.comparison.subjects import subject_of
from kvgen.contract import Backend
from kvgen.errors import CacheError


class VerifiedBackend(Backend):
    """Wrap a backend; compare its cached logits with uncached logits of the same text.

    every: check one cached step in this many, starting with the first; None to check only the first.
    on_wrong: called with a description if the cache is wrong; from then on every step is uncached. None to raise
        CacheError.
    """

    def __init__(self, inner: Backend, every: int | None, on_wrong: Callable[[str], None] | None = None) -> None:
        self._inner = inner
        self._every = every
        self._on_wrong = on_wrong
        self._cached_steps = 0
        self._uncached_only = False
        self.name, self.device, self.dtype = inner.name, inner.device, inner.dtype
        self.vocab_size, self.context_length = inner.vocab_size, inner.context_length
        self.rewinds, self.engine, self.position_bytes = inner.rewinds, inner.engine, inner.position_bytes

    def __call__(self, ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        if self._uncached_only:
            return self._inner(ids, None)[0], None
        logits, new_cache = self._inner(ids, cache)
        if cache is None or not self._is_due():
            return logits, new_cache
        reference = Reference(subject_of(self._inner))
        rows = [ids[row : row + 1] for row in range(ids.shape[0])]
        uncached = torch.stack([reference.last_logits(row) for row in rows])[:, None].to(logits.device)  # (B, 1, vocab)
        if uncached.isnan().any():
            return uncached, None  # the decoding loop reports NaN
        judgements = [reference.judge_step(row[-1].cpu(), ids) for row, ids in zip(logits, rows, strict=True)]
        wrong = max(judgements, key=lambda judgement: judgement.ratio)
        if not wrong.wrong:
            return logits, new_cache
        found = (
            f"after {ids.shape[1]} positions cached logits differ from uncached ones by {max(wrong.distances):.2g} "
            f"(RMS), where rounding is about {wrong.floor:.1g}; `kvgen compare` shows why"
        )
        if self._on_wrong is None:
            raise CacheError(f"the KV cache is wrong: {found}")
        self._on_wrong(found)
        self._uncached_only = True
        return uncached, None

    def watch(self, progress: Callable[[int, int], None] | None) -> bool:
        return self._inner.watch(progress)

    def _is_due(self) -> bool:
        step, self._cached_steps = self._cached_steps, self._cached_steps + 1
        return step == 0 if self._every is None else step % self._every == 0
