"""Alternating updates (Baykal et al. 2023, arXiv:2301.13310): several residual streams, of which a block computes one.

Streams are (rows, S, dim). Coefficients are in the dtype of the model, the tanh that routes in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kvgen.model.config import AltUp, DecoderConfig
from kvgen.model.layers import Linear, make_norm
from kvgen.model.moe import StackedLinear

_SMALLEST_SQUARE = 1e-5


class StreamsModule(nn.Module):
    """Makes the streams of the embedding, and one output of the streams.

    The other streams are projections, scaled to the root mean square of the first one.
    """

    def __init__(self, spec: AltUp, config: DecoderConfig) -> None:
        super().__init__()
        self.others = spec.streams - 1
        self.split = StackedLinear(self.others, config.dim, config.dim, bias=False)
        self.merge = StackedLinear(self.others, config.dim, config.dim, bias=False)

    def made_of(self, x: Tensor) -> Tensor:
        """x: (rows, dim). Returns (rows, S, dim)."""
        return torch.stack([x, *(_as_large(self.split(x, i), x) for i in range(self.others))], dim=1)

    def merged(self, streams: Tensor) -> Tensor:
        """streams: (rows, S, dim). Returns their mean, (rows, dim)."""
        first, *others = streams.unbind(1)
        projected = (_as_large(self.merge(x, i), first) for i, x in enumerate(others))
        return torch.stack([first, *projected], dim=1).mean(1)


def _as_large(x: Tensor, target: Tensor) -> Tensor:
    """Scale the rows of x, (rows, dim), to the root mean square of those of target."""
    wanted, own = target.square().mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
    return x * wanted.sqrt() / own.clamp(min=_SMALLEST_SQUARE).sqrt()


class AltUpModule(nn.Module):
    """What surrounds a block: it predicts all streams, computes one, and corrects all by its error."""

    def __init__(self, spec: AltUp, config: DecoderConfig) -> None:
        super().__init__()
        self.spec, self.scale, count = spec, config.dim**-1.0, spec.streams
        self.router_norm = make_norm(config.norm, (config.dim,), config.norm_eps, bias=False)
        self.router = Linear(config.dim, count)
        self.predict = Linear(count, count * count)
        self.correct = Linear(count, count)
        self.output_scale = nn.Parameter(torch.empty(config.dim))

    def forward(self, streams: Tensor, block: Callable[[Tensor], Tensor], added: Callable[[Tensor], Tensor]) -> Tensor:
        """streams: (rows, S, dim), and returned.

        block: of the active stream, (rows, dim), its new values. added: of these, what is added to all streams but the
        first one.
        """
        active, count = self.spec.active, self.spec.streams
        coefficients = self.predict(self._route(streams[:, active])).view(-1, count, count)  # (rows, to, from)
        predicted = streams + coefficients @ streams
        computed = block(predicted[:, active])
        errors = (computed - predicted[:, active])[:, None]  # (rows, 1, dim)
        corrected = predicted + errors * (self.correct(self._route(computed)) + 1)[:, :, None]
        read = corrected[:, active] * self.output_scale if self.spec.output_scale else corrected[:, active]
        first, others = corrected[:, :1], corrected[:, 1:]
        return torch.cat((first, others + added(read)[:, None]), dim=1)

    def _route(self, x: Tensor) -> Tensor:
        """x: (rows, dim). Returns (rows, S)."""
        routed = self.router(self.router_norm(x) * self.scale)
        return torch.tanh(routed.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
