"""An MLP and a mixture of experts side by side."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLPAndExperts, Router
from kvgen.model.layers import MLPModule, make_norm, rms_normed
from kvgen.model.moe import ExpertsModule, RouterModule


class MLPAndExpertsModule(nn.Module):
    """The module of `ffns.MLPAndExperts`: norm(mlp(norm(x))) + norm(experts(norm(x))), each norm its own.

    The router reads x itself, so the block has no `ffn_norm`.
    """

    def __init__(self, spec: MLPAndExperts, config: DecoderConfig) -> None:
        super().__init__()
        norm = partial(make_norm, config.norm, (config.dim,), config.norm_eps, bias=False)
        self.mlp_norm, self.experts_norm = norm(), norm()
        self.mlp = MLPModule(spec.mlp, config, "ffn.mlp")
        self.router = ScaledRouterModule(spec.router, config)
        self.experts = ExpertsModule(spec.expert, spec.router.experts, config.dim, config.biases)
        self.post_mlp_norm, self.post_experts_norm = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, dim), not normalized. Returns (rows, dim)."""
        mixed = self.experts.mixed(self.experts_norm(x), *self.router(x))
        out: Tensor = self.post_mlp_norm(self.mlp(self.mlp_norm(x))) + self.post_experts_norm(mixed)
        return out


class ScaledRouterModule(RouterModule):
    """A router that reads x over its root mean square, scaled by a learned vector, and weighs each expert by a learned
    number as well."""

    def __init__(self, spec: Router, config: DecoderConfig) -> None:
        super().__init__(spec, config)
        self.eps = config.norm_eps
        self.scale = nn.Parameter(torch.empty(config.dim))
        self.expert_scale = nn.Parameter(torch.empty(spec.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen, weights = super().forward(rms_normed(x, self.eps) * self.scale * x.shape[-1] ** -0.5)
        return chosen, weights * self.expert_scale[chosen]
