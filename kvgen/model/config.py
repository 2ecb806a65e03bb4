"""The description of a decoder: its layers and their sizes. It names no model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kvgen.model.ffns import MLP, MoE
from kvgen.model.mixers import Attention, Mixer, Recurrent, Rotary


@dataclass(frozen=True)
class Layer:
    """One block: a mixer, which combines positions, and a feed-forward layer, which treats each position alone.

    ffn: None for a mixer alone.

    To add a mixer: a dataclass in `mixers.py` (a subclass of `Recurrent` if it has one state for all positions), a
    module in its own file in `kvgen/model/`, an entry in `MIXERS` (`decoder.py`), and, unless it is recurrent, a state
    in `states.py`. To add a feed-forward layer: a dataclass in `ffns.py`, a module, an entry in `FFNS`.
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
