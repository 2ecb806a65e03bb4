"""Mixers, which combine positions: a dataclass for each mechanism, with its sizes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

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
    value_norm: normalize values per head by their root mean square, without a weight.
    keys_as_values: the values are the projected keys, before norm and rotation; values have no projection of their own.
    output_gate: multiply the outputs of heads by the sigmoid of a projection of the input (Qiu et al. 2025,
        arXiv:2505.06708).
    sinks: each head has a learned score that takes part in the softmax, and no value (OpenAI 2025, arXiv:2508.10925,
        section 2.1; compare Xiao et al. 2023, arXiv:2309.17453).
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
    value_norm: bool = False
    keys_as_values: bool = False
    output_gate: bool = False
    sinks: bool = False

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotary embeddings of keys and queries."""
        return tuple(rotary for rotary in (self.rotary, self.query_rotary) if rotary is not None)

    @property
    def stored(self) -> tuple[int, int, int]:
        """What a cache keeps of a position: the number of heads, and the widths of the keys and values of each."""
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def projected(self) -> int:
        """See `Recurrent.projected`."""
        heads = (2 + self.output_gate) * self.heads + (2 - self.keys_as_values) * self.kv_heads
        return heads * self.head_dim


@dataclass(frozen=True)
class SharedAttention:
    """Attention to the keys and values of an earlier layer, which keeps them in the cache (Brandon et al. 2024,
    arXiv:2405.12981). It has only queries of its own.

    attention: as in the layer that keeps them. state: number of that layer's state in the cache.
    """

    attention: Attention
    state: int

    @property
    def window(self) -> int | None:
        """See `Attention`."""
        return self.attention.window

    @property
    def projected(self) -> int:
        """See `Recurrent.projected`."""
        return 2 * self.attention.heads * self.attention.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: all heads make their keys and values of one latent (DeepSeek-V2, arXiv:2405.04434,
    section 2.1).

    key_dim, value_dim: dimensions of a head's key and value that are made of the latent.
    latent_dim: numbers of that latent. query_latent_dim: of the one that queries are made of; None if there is none.
    rotary: of the key that all heads share, and of as many further dimensions of their queries.
    norm_eps: of the RMS norms of both latents. scale: of query-key products; None for head_dim ** -0.5.
    """

    heads: int
    key_dim: int
    value_dim: int
    latent_dim: int
    query_latent_dim: int | None
    rotary: Rotary
    norm_eps: float
    scale: float | None = None

    window: ClassVar[None] = None

    @property
    def rotated(self) -> int:
        """Dimensions of the shared key."""
        return 2 * len(self.rotary.inverse_frequencies)

    @property
    def head_dim(self) -> int:
        """Dimensions of a head's query."""
        return self.key_dim + self.rotated

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """See `Attention.rotaries`."""
        return (self.rotary,)

    @property
    def stored(self) -> tuple[int, int, int]:
        """See `Attention.stored`: the shared key and, as its value, the latent."""
        return 1, self.rotated, self.latent_dim

    @property
    def projected(self) -> int:
        """See `Recurrent.projected`."""
        queries = self.query_latent_dim or self.heads * self.head_dim
        return queries + self.latent_dim + self.rotated + self.heads * self.value_dim


class Recurrent(ABC):
    """Base class of recurrent mixers: they keep one state, whatever the length of the text."""

    rotaries: ClassVar[tuple[Rotary, ...]] = ()

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
class Mamba(Recurrent):
    """A selective state space model (Gu and Dao 2023, arXiv:2312.00752), with norms on what steers it.

    inner: channels between the projections. size: of the state of each. width: positions that the convolution reads,
        including the current one. rank: numbers that the time steps of all channels are made of.
    """

    inner: int
    size: int
    width: int
    rank: int

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.width - 1, self.inner), (self.inner, self.size)

    @property
    def projected(self) -> int:
        return 3 * self.inner


@dataclass(frozen=True)
class Mamba2(Recurrent):
    """A state space model (Dao and Gu 2024, arXiv:2405.21060).

    heads, head_dim: their product is the inner width. size: of the state, for each number of a head. groups: heads of a
        group share how they read and write it. width: positions that the convolution reads, including the current one.
    dt_limit: least and largest time step.
    norm: of the heads' output, group by group, after it is multiplied by the gate, or before; None for no norm.
    """

    heads: int
    head_dim: int
    groups: int
    size: int
    width: int
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm: Literal["after-gate", "before-gate"] | None = "after-gate"

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


@dataclass(frozen=True)
class DeltaNet(Recurrent):
    """A gated delta net: linear attention that erases what it overwrites (Yang et al. 2024, arXiv:2412.06464).

    heads, value_dim: of values; their product is the inner width. key_heads, key_dim: of queries and keys, each of
        which neighbouring heads share. width: positions that the convolution reads, including the current one.
    """

    heads: int
    value_dim: int
    key_heads: int
    key_dim: int
    width: int

    @property
    def inner(self) -> int:
        """Numbers of all values together, and of the output gate."""
        return self.heads * self.value_dim

    @property
    def keys(self) -> int:
        """Numbers of all keys together, and of all queries."""
        return self.key_heads * self.key_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys + self.inner

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.width - 1, self.convolved), (self.heads, self.key_dim, self.value_dim)

    @property
    def projected(self) -> int:
        return self.convolved + 2 * self.inner + 2 * self.heads


Mixer = Attention | LatentAttention | ShortConv | Mamba | Mamba2 | DeltaNet


@dataclass(frozen=True)
class Parallel:
    """Mixers that read the same input, and whose outputs are added (Zuo et al. 2025, arXiv:2507.22448)."""

    mixers: tuple[Mixer, ...]
