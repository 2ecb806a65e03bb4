"""What a decoder is made of. Every field names a mechanism; none names a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout.

    inverse_frequencies: radians per position, one for each pair of the first dimensions of a head; the dimensions
        beyond are not rotated. Context-extension schemes (linear, YaRN and their like) are already folded in.
    scale: multiplies the rotated queries and keys (YaRN's attention factor); 1 for most schemes.
    long_frequencies: LongRoPE (Ding et al. 2024, arXiv:2402.13753): what to rotate every position of a sequence by
        that is longer than `short_length`.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    long_frequencies: tuple[float, ...] = ()
    short_length: int = 0

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` positions is rotated by `long_frequencies`."""
        return bool(self.long_frequencies) and length > self.short_length


@dataclass(frozen=True)
class Layer:
    """What may be another in each layer.

    rotary: None for a layer that does not rotate.
    window: how many positions a query sees, its own among them; None for all.
    """

    rotary: Rotary | None = None
    window: int | None = None


@dataclass(frozen=True)
class QKNorm:
    """A norm of queries and keys before they are rotated.

    kind: `l2` makes each head a unit vector, without the mean of `rms`.
    over: `head`, each head by one weight of the head's size; `each-head`, by a weight of its own; `unscaled`, by none;
        `all`, the whole projection at once.
    """

    kind: Literal["rms", "layer", "l2"]
    over: Literal["head", "each-head", "unscaled", "all"]
    eps: float


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder with grouped-query attention over positions, then an MLP over each.

    context_length: None if nothing bounds it.
    layers: one entry for each block.
    norm: `rms`, or `layer` with the mean taken off. norms: which of a block's norms there are: `attn_norm` and
        `ffn_norm` before its parts, `post_attention_norm` and `post_ffw_norm` after them.
    biases: the layers that have a bias, by name inside a block (`attn.q`, `ffn.up`, `attn_norm`, ...), or
        `output`, `output_norm`.
    tied_head: the output head is the token embedding.
    gated, activation: down(act(gate(x)) * up(x)), or down(act(up(x))). `gelu_tanh` is the tanh approximation.
    parallel: MLP and attention read the same x; without an `ffn_norm`, the same normed x.
    learned_positions: rows of a table that is added to the token embedding; 0 for none.
    alibi: slopes, one for each head, of a bias that falls with distance (Press et al. 2021, arXiv:2108.12409).
    attention_scale: of query-key products; None for head_dim ** -0.5.
    attention_softcap, logit_softcap: cap * tanh(x / cap) of scores and logits (arXiv:2408.00118).
    embedding_scale, residual_scale, logit_scale: of embeddings, of what a block's parts add, of logits.
    """

    vocab_size: int
    context_length: int | None
    dim: int
    layers: tuple[Layer, ...]
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    tied_head: bool
    norm: Literal["rms", "layer"] = "rms"
    norms: frozenset[str] = frozenset({"attn_norm", "ffn_norm"})
    biases: frozenset[str] = frozenset()
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    parallel: bool = False
    qk_norm: QKNorm | None = None
    learned_positions: int = 0
    alibi: tuple[float, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @cached_property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotations that layers use, each once."""
        return tuple(dict.fromkeys(layer.rotary for layer in self.layers if layer.rotary is not None))

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The windows that layers use, each once."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @cached_property
    def products(self) -> int:
        """Multiplications that a position takes in all layers, but for those of attention with other positions."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        return len(self.layers) * self.dim * (attention + (2 + self.gated) * self.ffn_dim)
