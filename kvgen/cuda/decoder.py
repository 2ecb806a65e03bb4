"""The decoder on an NVIDIA GPU: steps of one sequence are one CUDA graph, everything else is the module's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvgen.cuda.step import Step
from kvgen.model.cache import KVCache
from kvgen.model.causal_lm import CausalLM
from kvgen.model.decoder import Decoder
from kvgen.model.spans import Span
from kvgen.model.states import KeyValues


class CudaDecoder(CausalLM):
    """Runs the passes of a `Decoder` over one position of one sequence on kernels; see `lacking` for which decoders.

    Longer passes and batches run on the module. graphs: see `Step`.
    """

    def __init__(self, module: Decoder, kv_dtype: torch.dtype | None = None, graphs: bool = True) -> None:
        self.module, self.config, self.rotaries = module, module.config, module.rotaries
        self.dtype, self.device, self.kv_dtype = module.dtype, module.device, kv_dtype
        self._step = Step(module, kv_dtype or module.dtype, graphs)
        self._places: WeakKeyDictionary[KVCache, tuple[Sequence[KeyValues], list[int]]] = WeakKeyDictionary()

    def extend(self, spans: Sequence[Span]) -> Tensor:
        span = spans[0]
        if len(spans) > 1 or span.rows > 1 or (span.cache.dtype or self.dtype) != (self.kv_dtype or self.dtype):
            return self.module.extend(spans)
        self.check(spans)
        hidden = self._step(int(span.new), span.start, span.cache.length, span.total, self._places_of(span.cache))
        span.cache.advance(span.new)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return self._step.head(hidden) if len(hidden) == 1 else self.module.head(hidden)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return those of the module."""
        return self.module.named_parameters()

    def token_rows(self, ids: Tensor) -> Tensor:
        return self.module.token_rows(ids)

    def position_rows(self, positions: Tensor) -> Tensor:
        return self.module.position_rows(positions)

    def _places_of(self, cache: KVCache) -> list[int]:
        """Make room for one position; return where each layer keeps keys and values, as `Step` reads it."""
        reserved = cache.reserve(1)
        known = self._places.get(cache)
        if known is None or known[0] is not reserved:
            places = [
                number
                for buffers in reserved
                for number in (
                    buffers.keys.data_ptr(),
                    buffers.values.data_ptr(),
                    buffers.keys.stride(1),
                    buffers.first,
                )
            ]
            known = self._places[cache] = reserved, places
        return known[1]
