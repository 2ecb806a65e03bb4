"""Mixtures of experts: a router chooses a few experts for each position, and only these are computed."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MLPAndExperts, MoE, Router
from kvgen.model.layers import Linear, MLPModule, combine


class RouterModule(nn.Module):
    """The module of `ffns.Router`. It computes in float32 or wider, whatever the dtype of the model."""

    def __init__(self, spec: Router, config: DecoderConfig) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.experts, config.dim))
        self.bias = nn.Parameter(torch.empty(spec.experts)) if "ffn.router" in config.biases else None
        self.selection = SelectionBias(spec.experts) if spec.selection_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (rows, dim). Returns the chosen experts of each row, ascending, and their weights: (rows, active) each."""
        spec, dtype = self.spec, torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = F.linear(x.to(dtype), self.weight.to(dtype), bias)  # (rows, experts)
        scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid()}.get(spec.scores, logits)
        preferences = scores if self.selection is None else self.selection(scores)
        chosen = self._keep_best_groups(preferences).topk(spec.active, sorted=False).indices.sort().values
        weights = scores.gather(-1, chosen)
        if spec.scores == "softmax_of_chosen":
            weights = weights.softmax(-1)
        if spec.normalize:
            total = weights.sum(-1, keepdim=True) + spec.added_to_sum
            weights = weights / total.clamp(min=spec.smallest_sum)
        return chosen, weights * spec.scale

    def _keep_best_groups(self, preferences: Tensor) -> Tensor:
        """Set the preferences of experts outside the best groups to -inf (DeepSeek-V3, section 2.1.2)."""
        spec = self.spec
        if spec.active_groups == spec.groups:
            return preferences
        grouped = preferences.view(len(preferences), spec.groups, -1)  # (rows, groups, experts of a group)
        best = grouped.topk(spec.group_top).values.sum(-1).topk(spec.active_groups, sorted=False).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, value=True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)


class SelectionBias(nn.Module):
    """See `Router.selection_bias`."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(experts))

    def forward(self, scores: Tensor) -> Tensor:
        return scores + self.bias.to(scores.dtype)


class StackedLinear(nn.Module):
    """One `Linear` for each expert: weights (experts, outputs, inputs)."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class ExpertsModule(nn.Module):
    """All experts, each an MLP of the same sizes, which reads and writes `dim` numbers."""

    def __init__(self, spec: MLP, experts: int, dim: int, biases: frozenset[str]) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.gate = StackedLinear(experts, dim, width, bias="ffn.experts.gate" in biases) if spec.gated else None
        self.up = StackedLinear(experts, dim, width, bias="ffn.experts.up" in biases)
        self.down = StackedLinear(experts, width, dim, bias="ffn.experts.down" in biases)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Return the output of one expert for x, (rows, dim of the experts)."""
        gate = None if self.gate is None else self.gate(x, expert)
        out: Tensor = self.down(combine(self.spec, gate, self.up(x, expert)), expert)
        return out

    def mixed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted outputs of the chosen experts of each row, added. chosen, weights: (rows, active).

        They are added in ascending order of experts, so that the result of a row depends on the rows beside it only by
        the rounding of matrix products.
        """
        order = chosen.flatten().argsort(stable=True)  # pairs of row and expert, by expert
        rows, weights = order // chosen.shape[1], weights.flatten()[order, None]
        total = torch.zeros_like(x, dtype=weights.dtype)
        end = 0
        for expert, count in enumerate(chosen.flatten().bincount().tolist()):
            if count:
                used = slice(end, end := end + count)
                total.index_add_(0, rows[used], self(x[rows[used]], expert) * weights[used])
        return total.to(x.dtype)


class MoEModule(nn.Module):
    """The module of `ffns.MoE`."""

    def __init__(self, spec: MoE, config: DecoderConfig) -> None:
        super().__init__()
        self.router = RouterModule(spec.router, config)
        self.experts = ExpertsModule(spec.expert, spec.router.experts, spec.latent or config.dim, config.biases)
        dim, latent, biases = config.dim, spec.latent, config.biases
        self.latent_down = Linear(dim, latent, bias="ffn.latent_down" in biases) if latent else None
        self.latent_up = Linear(latent, dim, bias="ffn.latent_up" in biases) if latent else None
        self.shared = None if spec.shared is None else MLPModule(spec.shared, config, "ffn.shared")
        self.shared_gate = Linear(config.dim, 1) if spec.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, dim). Returns (rows, dim)."""
        chosen, weights = self.router(x)  # (rows, active)
        mixed = self.experts.mixed(x if self.latent_down is None else self.latent_down(x), chosen, weights)
        mixed = mixed if self.latent_up is None else self.latent_up(mixed)
        return mixed if self.shared is None else mixed + self._shared(x)

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        out: Tensor = self.shared(x)
        return out if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * out


def used_share(config: DecoderConfig, parameter: str) -> float:
    """Return the share of a parameter, by name, that the computation of one position uses: 1 except for experts."""
    found = re.match(r"blk\.(\d+)\.ffn\.experts\.", parameter)
    ffn = config.layers[int(found[1])].ffn if found else None
    return ffn.router.active / ffn.router.experts if isinstance(ffn, MoE | MLPAndExperts) else 1.0
