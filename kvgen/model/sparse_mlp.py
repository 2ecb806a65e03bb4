"""An MLP of which only the largest gates are open."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import SparseMLP
from kvgen.model.layers import MLPModule, combine


class SparseMLPModule(MLPModule):
    """The module of `ffns.SparseMLP`.

    Gates become relu(gate - cutoff) before the activation. If they were distributed normally, those above mean +
    deviations * standard deviation would be a fixed share of them: a top-k without sorting.
    """

    def __init__(self, spec: SparseMLP, config: DecoderConfig) -> None:
        super().__init__(spec.mlp, config)
        self.deviations = spec.deviations

    def forward(self, x: Tensor) -> Tensor:
        assert self.gate is not None
        gate = self.gate(x)
        deviation, mean = torch.std_mean(gate, dim=-1, correction=0, keepdim=True)
        opened = F.relu(gate - (mean + self.deviations * deviation))
        out: Tensor = self.down(combine(self.spec, opened, self.up(x)))
        return out
