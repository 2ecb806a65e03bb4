"""What a forward pass computes: the new tokens of some sequences, and what all layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kvgen.model.cache import KVCache
from kvgen.model.mixers import Rotary
from kvgen.model.recurrent import Core


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence in a pass: `new`, (B, T) ids on the CPU, at positions from `start`.

    total: the length of the whole sequence, which may continue after this span.
    """

    new: Tensor
    cache: KVCache
    start: int
    total: int

    @property
    def rows(self) -> int:
        """B * T, the rows of this span in a pass."""
        return self.new.numel()

    def split(self, count: int) -> tuple[Span, Span]:
        """Return the first `count` positions, and the rest."""
        first = Span(self.new[:, :count], self.cache, self.start, self.total)
        return first, Span(self.new[:, count:], self.cache, self.start + count, self.total)


@dataclass(frozen=True)
class Pass:
    """Input of every layer in one pass besides the hidden states.

    rotations: cosines and sines for the new positions, per rotary of the config, (rows, 1, R) each.
    shared: values that a layer has computed for later layers of the same kind, such as masks.
    layer_inputs: (rows, layers, width), if the config has them.
    """

    spans: Sequence[Span]
    rotations: Mapping[Rotary, tuple[Tensor, Tensor]]
    shared: dict[Any, Any] = field(default_factory=dict)
    layer_inputs: Tensor | None = None

    def recur(self, state: int, core: Core, *inputs: Tensor) -> Tensor:
        """Run the recurrence of one mixer over the new positions of all spans, (rows, ...) each: (rows, D).

        state, core: see `KVCache.recur`, which gets the inputs of one span, (B, T, ...) each.
        """
        rows = [span.rows for span in self.spans]
        outputs = []
        for span, *parts in zip(self.spans, *(torch.split(part, rows) for part in inputs), strict=True):
            shaped = tuple(part.reshape(*span.new.shape, -1) for part in parts)
            outputs.append(span.cache.recur(state, core, shaped).flatten(0, 1))
        return torch.cat(outputs)


def ids_of(spans: Sequence[Span], device: torch.device) -> Tensor:
    """Return the token of each row, (rows,) int64."""
    return torch.cat([span.new.flatten() for span in spans]).to(device)


def positions_of(spans: Sequence[Span], device: torch.device | None = None) -> Tensor:
    """Return the position of each row, (rows,) int64."""
    runs = (range(span.start, span.start + span.new.shape[1]) for span in spans for _ in range(span.new.shape[0]))
    return torch.tensor(list(chain.from_iterable(runs)), device=device)
