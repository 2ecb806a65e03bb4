"""Feed-forward layers, which treat each position alone: a dataclass for each mechanism, with its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scores = Literal["softmax", "sigmoid", "softmax_of_chosen"]


@dataclass(frozen=True)
class XIELU:
    """The activation xIELU (Huang and Schlag 2024, arXiv:2411.13010) with its learned slopes.

    positive * x^2 + linear * x above 0, else negative * (exp(min(x, limit)) - 1 - x) + linear * x.
    """

    positive: float
    negative: float
    linear: float
    limit: float

    def __str__(self) -> str:
        return "xielu"


@dataclass(frozen=True)
class ClampedSwiGLU:
    """What a gated MLP makes of its projections (OpenAI 2025, arXiv:2508.10925, section 2.2):
    g * sigmoid(alpha * g) * (u + 1), for g = min(gate, limit) and u = max(-limit, min(up, limit)).
    """

    alpha: float
    limit: float

    def __str__(self) -> str:
        return "clamped swiglu"


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] | XIELU
Combination = Activation | ClampedSwiGLU  # what a gated MLP makes of gate and up


@dataclass(frozen=True)
class MLP:
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202); without a gate, down(act(up(x))).

    `ClampedSwiGLU` stands for what is inside of down().

    width: of the hidden layer. activation: `gelu_tanh` is the tanh approximation; `relu2` is relu(x)^2 (So et al. 2021,
        arXiv:2109.08668).
    """

    width: int
    gated: bool = True
    activation: Combination = "silu"

    @property
    def products(self) -> int:
        """Multiplications per position in its weight matrices, divided by the width of the model."""
        return (2 + self.gated) * self.width


@dataclass(frozen=True)
class Router:
    """Chooses the experts of each position and weighs their outputs (Shazeer et al. 2017, arXiv:1701.06538).

    experts: how many there are. active: how many are chosen for a position.
    scores: of the router's logits: `softmax`, over all experts; `softmax_of_chosen`, over the logits of the chosen
        ones, which the largest logits choose; `sigmoid`, of each logit alone.
    normalize: divide the scores of the chosen experts by their sum and `added_to_sum`, or by `smallest_sum` if that is
        larger.
    scale: multiplies the weights.
    selection_bias: a learned number per expert, added to the scores to choose experts, but not to weigh them
        (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    groups, active_groups: experts are in groups of neighbours; only those of the best groups can be chosen.
    group_top: how many of a group's best scores are added to make the score of the group.
    """

    experts: int
    active: int
    scores: Scores = "softmax"
    normalize: bool = False
    smallest_sum: float = 1e-20
    added_to_sum: float = 0.0
    scale: float = 1.0
    selection_bias: bool = False
    groups: int = 1
    active_groups: int = 1
    group_top: int = 1


@dataclass(frozen=True)
class MoE:
    """A mixture of experts: the weighted outputs of the chosen experts, and that of a shared expert, added.

    expert: one expert. shared: the expert that every position uses; None if there is none.
    shared_gate: multiply the output of the shared expert by the sigmoid of a learned number per position.
    latent: the width of what the chosen experts read and write, which is projected from and to that of the model
        (Elango et al. 2026, arXiv:2601.18089); None for that of the model itself.
    """

    router: Router
    expert: MLP
    shared: MLP | None = None
    shared_gate: bool = False
    latent: int | None = None

    @property
    def products(self) -> int:
        """As `MLP.products`; at most so many if experts read latents."""
        shared = 2 * (self.latent or 0) + (0 if self.shared is None else self.shared.products)
        return self.router.experts + self.router.active * self.expert.products + shared


@dataclass(frozen=True)
class MLPAndExperts:
    """An MLP and a mixture of experts side by side, each with norms of its own; see `kvgen.model.mlp_and_experts`."""

    mlp: MLP
    router: Router
    expert: MLP

    @property
    def products(self) -> int:
        """As `MLP.products`."""
        return self.mlp.products + self.router.experts + self.router.active * self.expert.products


@dataclass(frozen=True)
class SparseMLP:
    """A gated MLP of which only the largest gates are open; see `kvgen.model.sparse_mlp`.

    deviations: how many standard deviations above the mean a gate must be to be open.
    """

    mlp: MLP
    deviations: float

    @property
    def products(self) -> int:
        """As `MLP.products`."""
        return self.mlp.products
