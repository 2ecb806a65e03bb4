"""Inputs of each block besides the residual stream: per-layer embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig, LayerInputs
from kvgen.model.layers import Embedding, Linear, make_activation, make_norm
from kvgen.model.spans import Pass


class LayerInputsModule(nn.Module):
    """Makes the inputs of all blocks: ((norm of projection of embedding) + sqrt(width) * row of token) / sqrt(2)."""

    def __init__(self, spec: LayerInputs, config: DecoderConfig) -> None:
        super().__init__()
        self.spec, self.scale = spec, config.dim**-0.5
        numbers = len(config.layers) * spec.width
        self.token_embd = Embedding(spec.rows, numbers)
        self.projection = Linear(config.dim, numbers)
        self.norm = make_norm(config.norm, (spec.width,), config.norm_eps, bias=False)

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """ids: (rows,). embedded: the input of the first block, (rows, dim). Returns (rows, layers, width)."""
        width = self.spec.width
        rows = self.token_embd(torch.where(ids < self.spec.rows, ids, 0)) * width**0.5
        projected = self.norm((self.projection(embedded) * self.scale).view(len(ids), -1, width))
        out: Tensor = (projected + rows.view(projected.shape)) * 2**-0.5
        return out


class LayerInputModule(nn.Module):
    """What one block adds to the residual stream: norm(projection(act(gate(x)) * input)).

    layer: number of the block.
    """

    def __init__(self, spec: LayerInputs, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.activation = layer, make_activation(spec.activation)
        self.gate = Linear(config.dim, spec.width)
        self.projection = Linear(spec.width, config.dim)
        self.norm = make_norm(config.norm, (config.dim,), config.norm_eps, bias=False)

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: (rows, dim). Returns (rows, dim)."""
        assert batch.layer_inputs is not None
        out: Tensor = self.norm(self.projection(self.activation(self.gate(x)) * batch.layer_inputs[:, self.layer]))
        return out
