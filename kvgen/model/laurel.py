"""LAuReL, a learned residual connection (Menghani et al. 2024, arXiv:2411.07501), of low rank."""

from __future__ import annotations

from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Linear, make_norm


class LaurelModule(nn.Module):
    """See `DecoderConfig.laurel_rank`: (x + normed + norm(right(left(normed)))) / sqrt(2)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.left = Linear(config.dim, config.laurel_rank)
        self.right = Linear(config.laurel_rank, config.dim)
        self.norm = make_norm(config.norm, (config.dim,), config.norm_eps, bias=False)

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """x: the residual stream after the mixer. normed: what the mixer has read. (rows, dim) each, and returned."""
        added: Tensor = normed + self.norm(self.right(self.left(normed)))
        return (x + added) * 2**-0.5
