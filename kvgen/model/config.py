"""What a decoder is made of. Every field names a mechanism; none names a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


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
class Attention:
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    rotary: None for no rotation.
    window: how many positions a query sees, its own among them; None for all.
    alibi: slopes, one for each head, of a bias that falls with distance (Press et al. 2021, arXiv:2108.12409).
    scale: of query-key products; None for head_dim ** -0.5.
    softcap: cap * tanh(x / cap) of scores (arXiv:2408.00118).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary | None = None
    window: int | None = None
    qk_norm: QKNorm | None = None
    alibi: tuple[float, ...] = ()
    scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class MLP:
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), or without a gate down(act(up(x))).

    width: of the hidden layer. activation: `gelu_tanh` is the tanh approximation.
    """

    width: int
    gated: bool = True
    activation: Activation = "silu"


@dataclass(frozen=True)
class Layer:
    """One block. mixer: what looks at other positions. ffn: what works on each position by itself.

    A new kind is a dataclass here, a module in `kvgen.model` that is entered in `kvgen.model.decoder`, and for a mixer
    a state in `kvgen.model.states`.
    """

    mixer: Attention
    ffn: MLP


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    context_length: None if nothing bounds it.
    layers: one entry for each block.
    norm: `rms`, or `layer` with the mean taken off. norms: which of a block's norms there are: `attn_norm` and
        `ffn_norm` before its parts, `post_attention_norm` and `post_ffw_norm` after them.
    biases: the layers that have a bias, by name inside a block (`attn.q`, `ffn.up`, `attn_norm`, ...), or
        `output`, `output_norm`.
    tied_head: the output head is the token embedding.
    parallel: mixer and MLP read the same x; without an `ffn_norm`, the same normed x.
    learned_positions: rows of a table that is added to the token embedding; 0 for none.
    logit_softcap: cap * tanh(x / cap) of logits.
    embedding_scale, residual_scale, logit_scale: of embeddings, of what a block's parts add, of logits.
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
        """The first layer's, for what all layers share."""
        return self.layers[0].mixer

    @property
    def mlp(self) -> MLP:
        """The first layer's, for what all layers share."""
        return self.layers[0].ffn

    @cached_property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The rotations that layers use, each once."""
        return tuple(dict.fromkeys(layer.mixer.rotary for layer in self.layers if layer.mixer.rotary is not None))

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The windows that layers use, each once."""
        return tuple(dict.fromkeys(layer.mixer.window for layer in self.layers))

    @cached_property
    def products(self) -> int:
        """Multiplications that a position takes in all layers, but for those of attention with other positions."""
        total = 0
        for layer in self.layers:
            total += 2 * (layer.mixer.heads + layer.mixer.kv_heads) * layer.mixer.head_dim
            total += (2 + layer.ffn.gated) * layer.ffn.width
        return self.dim * total
