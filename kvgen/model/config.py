"""The description of a decoder: mechanisms and their sizes. It names no model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
QKNorm = Literal["head", "each-head", "all"]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (RoPE, Su et al. 2021, arXiv:2104.09864) in the half-split layout.

    inverse_frequencies: radians per position, one per pair of dimensions; further dimensions of a head are not rotated.
        Context extension (linear, YaRN and others) is already applied.
    scale: multiplies rotated queries and keys (YaRN's attention factor).
    long_frequencies: LongRoPE (Ding et al. 2024, arXiv:2402.13753): used for all positions of a sequence that is longer
        than `short_length`.
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0
    long_frequencies: tuple[float, ...] = ()
    short_length: int = 0

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` positions uses `long_frequencies`."""
        return bool(self.long_frequencies) and length > self.short_length


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    rotary: None for no rotation.
    window: number of positions that a query attends to, including its own; None for all.
    qk_norm: normalize queries and keys before rotation, with the norm and eps of `DecoderConfig`: `head`, per head with
        a shared weight; `each-head`, per head with its own weight; `all`, the whole projection.
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


@dataclass(frozen=True)
class MLP:
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202); without a gate, down(act(up(x))).

    width: of the hidden layer. activation: `gelu_tanh` is the tanh approximation.
    """

    width: int
    gated: bool = True
    activation: Activation = "silu"


@dataclass(frozen=True)
class Layer:
    """One block: a mixer, which combines positions, and a feed-forward layer, which treats each position alone.

    To add a mixer: a dataclass in this file, a module in its own file in `kvgen/model/`, an entry in `MIXERS`
    (`decoder.py`), and a state in `states.py`. To add a feed-forward layer: a dataclass, a module, an entry in `FFNS`.
    """

    mixer: Attention
    ffn: MLP


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
        """The first layer's mixer, for settings that all layers share."""
        return self.layers[0].mixer

    @property
    def mlp(self) -> MLP:
        """The first layer's MLP, for settings that all layers share."""
        return self.layers[0].ffn

    @cached_property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The distinct rotary embeddings of all layers."""
        return tuple(dict.fromkeys(layer.mixer.rotary for layer in self.layers if layer.mixer.rotary is not None))

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of all layers."""
        return tuple(dict.fromkeys(layer.mixer.window for layer in self.layers))

    @cached_property
    def products(self) -> int:
        """Multiplications per position in all weight matrices of the layers."""
        total = 0
        for layer in self.layers:
            total += 2 * (layer.mixer.heads + layer.mixer.kv_heads) * layer.mixer.head_dim
            total += (2 + layer.ffn.gated) * layer.ffn.width
        return self.dim * total
