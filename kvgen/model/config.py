"""The description of a decoder: mechanisms and their sizes. It names no model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

QKNorm = Literal["head", "rotated-head", "each-head", "all"]
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


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] | XIELU


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (RoPE, Su et al. 2021, arXiv:2104.09864) in the half-split layout.

    inverse_frequencies: radians per position, one per pair of dimensions; further dimensions of a head are not rotated.
        Context extension (linear, YaRN and others) is already applied.
    scale: multiplies rotated queries and keys (YaRN's attention factor).
    long_frequencies: LongRoPE (Ding et al. 2024, arXiv:2402.13753): used for all positions of a sequence that is longer
        than `short_length`.
    growth: the scale of position p is multiplied by 1 + growth * ln(1 + floor(p / growth_length)), an attention
        temperature that grows with the text (compare Nakanishi 2025, arXiv:2501.19399).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    long_frequencies: tuple[float, ...] = ()
    short_length: int = 0
    growth: float = 0.0
    growth_length: int = 1

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` positions uses `long_frequencies`."""
        return bool(self.long_frequencies) and length > self.short_length


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    rotary: None for no rotation. query_rotary: that of queries, if it differs from that of keys.
    window: number of positions that a query attends to, including its own; None for all.
    qk_norm: normalize queries and keys before rotation, with the norm and eps of `DecoderConfig`: `head`, per head with
        a shared weight; `each-head`, per head with its own weight; `all`, the whole projection. `rotated-head` is
        `head` after rotation.
    scale: of query-key products; None for head_dim ** -0.5.
    softcap: scores become cap * tanh(score / cap) (arXiv:2408.00118).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary | None = None
    window: int | None = None
    qk_norm: QKNorm | None = None
    scale: float | None = None
    softcap: float | None = None
    query_rotary: Rotary | None = None

    @property
    def projected(self) -> int:
        """See `Recurrent.projected`."""
        return 2 * (self.heads + self.kv_heads) * self.head_dim


class Recurrent(ABC):
    """Base class of recurrent mixers: they keep one state, whatever the length of the text."""

    @property
    @abstractmethod
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the tensors of its state, for one sequence."""

    @property
    @abstractmethod
    def projected(self) -> int:
        """Numbers per position that its projections make of the residual stream, and make into its output."""


@dataclass(frozen=True)
class ShortConv(Recurrent):
    """A gated causal convolution over the last positions (Liquid AI 2025, arXiv:2511.23404).

    channels: each is convolved alone. width: positions that the convolution reads, including the current one.
    """

    channels: int
    width: int

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.width - 1, self.channels),)

    @property
    def projected(self) -> int:
        return 4 * self.channels


@dataclass(frozen=True)
class Mamba2(Recurrent):
    """A state space model (Dao and Gu 2024, arXiv:2405.21060).

    heads, head_dim: their product is the inner width. size: of the state, for each number of a head. groups: heads of a
        group share how they read and write it. width: positions that the convolution reads, including the current one.
    dt_limit: least and largest time step.
    """

    heads: int
    head_dim: int
    groups: int
    size: int
    width: int
    dt_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def inner(self) -> int:
        """The width between the projections."""
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: x, and B and C of each group."""
        return self.inner + 2 * self.groups * self.size

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.width - 1, self.convolved), (self.heads, self.head_dim, self.size)

    @property
    def projected(self) -> int:
        return 2 * self.inner + self.convolved + self.heads


Mixer = Attention | ShortConv | Mamba2


@dataclass(frozen=True)
class MLP:
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202); without a gate, down(act(up(x))).

    width: of the hidden layer. activation: `gelu_tanh` is the tanh approximation; `relu2` is relu(x)^2 (So et al. 2021,
        arXiv:2109.08668).
    """

    width: int
    gated: bool = True
    activation: Activation = "silu"

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
    normalize: divide the scores of the chosen experts by their sum, or by `smallest_sum` if that is larger.
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
    """

    router: Router
    expert: MLP
    shared: MLP | None = None
    shared_gate: bool = False

    @property
    def products(self) -> int:
        """As `MLP.products`."""
        shared = 0 if self.shared is None else self.shared.products
        return self.router.experts + self.router.active * self.expert.products + shared


@dataclass(frozen=True)
class Layer:
    """One block: a mixer, which combines positions, and a feed-forward layer, which treats each position alone.

    ffn: None for a mixer alone.

    To add a mixer: a dataclass in this file (a subclass of `Recurrent` if it has one state for all positions), a module
    in its own file in `kvgen/model/`, an entry in `MIXERS` (`decoder.py`), and, unless it is recurrent, a state in
    `states.py`. To add a feed-forward layer: a dataclass, a module, an entry in `FFNS`.
    """

    mixer: Mixer
    ffn: MLP | MoE | None


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    context_length: None if unbounded.
    norm: RMSNorm or LayerNorm. norms: the norms of a block: `attn_norm` and `ffn_norm` before mixer and MLP,
        `post_attention_norm` and `post_ffw_norm` after them.
    biases: the layers with a bias, by name inside a block (`attn.q`, `ffn.up`, `attn_norm`, ...), or `output`,
        `output_norm`.
    tied_head: the output head is the token embedding.
    parallel: mixer and MLP read the same x; without an `ffn_norm`, the same normalized x.
    learned_positions: rows of the learned position embedding; 0 for none.
    logit_softcap: logits become cap * tanh(logit / cap).
    embedding_scale, residual_scale, logit_scale: factors of embeddings, of the outputs of mixer and MLP, of logits.
    """

    vocab_size: int
    context_length: int | None
    dim: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied_head: bool
    norm: Literal["rms", "layer"] = "rms"
    norms: frozenset[str] = frozenset({"attn_norm", "ffn_norm"})
    biases: frozenset[str] = frozenset()
    parallel: bool = False
    learned_positions: int = 0
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def attention(self) -> Attention:
        """The first attention, for settings that all layers share. Raises LookupError if there is none."""
        return self.attentions[0]

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """The distinct attentions of all layers."""
        return tuple(dict.fromkeys(layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention)))

    @cached_property
    def recurrences(self) -> tuple[Recurrent, ...]:
        """The recurrent mixers of all layers, one for each layer that has one."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Recurrent))

    @property
    def mlp(self) -> MLP:
        """The first MLP, for settings that all layers share. Raises LookupError if there is none."""
        return [layer.ffn for layer in self.layers if isinstance(layer.ffn, MLP)][0]  # noqa: RUF015 (LookupError)

    @cached_property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The distinct rotary embeddings of all layers."""
        found = (rotary for mixer in self.attentions for rotary in (mixer.rotary, mixer.query_rotary))
        return tuple(dict.fromkeys(rotary for rotary in found if rotary is not None))

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of all layers."""
        return tuple(dict.fromkeys(attention.window for attention in self.attentions))

    @cached_property
    def products(self) -> int:
        """Multiplications per position in all weight matrices of the layers."""
        return self.dim * sum(layer.mixer.projected + (layer.ffn.products if layer.ffn else 0) for layer in self.layers)
