"""What a decoder is made of. Every field names a mechanism; none names a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout.

    inverse_frequencies: radians per position, one for each pair of dimensions of a head. Context-extension
        schemes (linear, YaRN and their like) are already folded into them.
    scale: multiplies the rotated queries and keys (YaRN's attention factor); 1 for the other schemes.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention, rotary positions and a gated MLP.

    biases: the linear layers that have a bias, by name inside a block (`attn.q`, `ffn.up`, ...), or `output`.
    tied_head: the output head is the token embedding.
    """

    vocab_size: int
    context_length: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    rotary: Rotary
    tied_head: bool
    biases: frozenset[str] = frozenset()
