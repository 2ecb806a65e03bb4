"""Mixers, which combine positions: a dataclass for each mechanism, with its sizes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

QKNorm = Literal["head", "rotated-head", "each-head", "all"]


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
