"""The description of a decoder: its layers and their sizes. It names no model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kvgen.model.ffns import MLP, Activation, MLPAndExperts, MoE, SparseMLP
from kvgen.model.mixers import Attention, Mixer, Parallel, Recurrent, Rotary, SharedAttention


@dataclass(frozen=True)
class Layer:
    """One block: a mixer, which combines positions, and a feed-forward layer, which treats each position alone.

    mixer: None for a feed-forward layer alone. ffn: None for a mixer alone.

    To add a mixer: a dataclass in `mixers.py` (a subclass of `Recurrent` if it has one state for all positions), a
    module in its own file in `kvgen/model/`, an entry in `MIXERS` (`decoder.py`), and, unless it is recurrent, a state
    in `states.py`. To add a feed-forward layer: a dataclass in `ffns.py`, a module, an entry in `FFNS`.
    """

    mixer: Mixer | Parallel | SharedAttention | None
    ffn: MLP | MoE | MLPAndExperts | SparseMLP | None

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Its mixers, one by one: each has a state of its own in the cache. None if it reads that of another layer."""
        if isinstance(self.mixer, Parallel):
            return self.mixer.mixers
        return () if self.mixer is None or isinstance(self.mixer, SharedAttention) else (self.mixer,)


@dataclass(frozen=True)
class LayerInputs:
    """Numbers of each position for each block, made of its token and embedding; see `kvgen.model.layer_inputs`.

    width: how many for each block. rows: of the table of tokens; ids beyond it use its first row.
    activation: of the gate in each block.
    """

    width: int
    rows: int
    activation: Activation


@dataclass(frozen=True)
class AltUp:
    """Several residual streams, of which each block computes one and corrects all; see `kvgen.model.altup`.

    streams: how many there are. active: the one that blocks compute. output_scale: the layer inputs' gate reads it
        multiplied by a learned vector.
    """

    streams: int
    active: int
    output_scale: bool


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    context_length: None if unbounded.
    norm: RMSNorm or LayerNorm. norms: the norms of a block: `attn_norm` and `ffn_norm` before mixer and MLP,
        `post_attention_norm` and `post_ffw_norm` after them. Before an MLP alone it is `attn_norm` too.
    biases: the layers with a bias, by name inside a block (`attn.q`, `ffn.up`, `attn_norm`, ...), or `output`,
        `output_norm`.
    tied_head: the output head is the token embedding.
    parallel: mixer and MLP read the same x; without an `ffn_norm`, the same normalized x.
    learned_positions: rows of the learned position embedding; 0 for none.
    logit_softcap: logits become cap * tanh(logit / cap).
    embedding_scale, residual_scale, logit_scale: factors of embeddings, of the outputs of mixer and MLP, of logits.
    layer_inputs: what each block adds besides mixer and MLP; None for nothing. altup: None for one residual stream.
    laurel_rank: of the learned residual connection around each mixer; 0 for none; see `kvgen.model.laurel`.
    block_scales: the output of each block is multiplied by a learned number.
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
    layer_inputs: LayerInputs | None = None
    altup: AltUp | None = None
    laurel_rank: int = 0
    block_scales: bool = False

    @cached_property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixers of all layers; the cache keeps one state for each."""
        return tuple(mixer for layer in self.layers for mixer in layer.mixers)

    @property
    def attention(self) -> Attention:
        """The first attention, for settings that all layers share. Raises LookupError if there is none."""
        return self.attentions[0]

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """The distinct attentions of all layers."""
        return tuple(dict.fromkeys(mixer for mixer in self.mixers if isinstance(mixer, Attention)))

    @cached_property
    def recurrences(self) -> tuple[Recurrent, ...]:
        """The recurrent mixers of all layers, one for each time that it occurs."""
        return tuple(mixer for mixer in self.mixers if isinstance(mixer, Recurrent))

    @property
    def mlp(self) -> MLP:
        """The first MLP, for settings that all layers share. Raises LookupError if there is none."""
        return [layer.ffn for layer in self.layers if isinstance(layer.ffn, MLP)][0]  # noqa: RUF015 (LookupError)

    @cached_property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The distinct rotary embeddings of all layers."""
        return tuple(dict.fromkeys(rotary for mixer in self.mixers for rotary in mixer.rotaries))

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of all layers."""
        return tuple(dict.fromkeys(attention.window for attention in self.attentions))

    @cached_property
    def products(self) -> int:
        """Multiplications per position in all weight matrices of the layers."""
        ffns = sum(layer.ffn.products for layer in self.layers if layer.ffn is not None)
        return self.dim * (ffns + sum(mixer.projected for mixer in (*self.mixers, *self._shared)))

    def products_at(self, length: int) -> int:
        """Multiplications per position in all layers, for one that attends to `length` positions."""
        return self.products + sum(
            products * (length if window is None else min(length, window))
            for window, products in self._attending_products.items()
        )

    @cached_property
    def _attending_products(self) -> Mapping[int | None, int]:
        """Multiplications for each position that is attended to, per window."""
        found: dict[int | None, int] = defaultdict(int)
        for mixer in (*self.mixers, *(shared.attention for shared in self._shared)):
            if not isinstance(mixer, Recurrent):
                found[mixer.window] += mixer.heads * sum(mixer.stored[1:])
        return found

    @cached_property
    def _shared(self) -> tuple[SharedAttention, ...]:
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, SharedAttention))
