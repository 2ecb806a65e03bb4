"""The buffers of a run, and their sizes."""

from __future__ import annotations

from enum import IntEnum

from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, MoE


class Slot(IntEnum):
    """The buffers of a run, (rows, width) fp32 each."""

    X = 0  # the residual stream
    NORMED = 1
    Q = 2
    K = 3
    V = 4
    MIXED = 5  # output of attention, before its projection
    OUT = 6  # output of mixer or MLP, if a norm follows
    GATE = 7
    UP = 8
    ROUTER = 9  # the logits of experts
    EXPERT_GATE = 10  # of the chosen experts of all rows, as (rows * active, width), in the order of experts
    EXPERT_UP = 11
    EXPERT_OUT = 12
    SHARED_GATE = 13  # of the shared expert
    SHARED_UP = 14
    SHARED_OUT = 15  # its output and its share, if it has a gate
    SHARE = 16
    LOGITS = 17


def slot_widths(config: DecoderConfig) -> tuple[int, ...]:
    """Return the width of each `Slot`."""
    attention, dim = config.attention, config.dim
    hidden = next((layer.ffn.width for layer in config.layers if isinstance(layer.ffn, MLP)), 0)
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    mixture = next((mixture_widths(mixture, dim) for mixture in mixtures_of(config)), (0,) * 8)
    return dim, dim, queries, keys, keys, queries, dim, hidden, hidden, *mixture, config.vocab_size


def mixture_widths(spec: MoE, dim: int) -> tuple[int, ...]:
    """Return the widths of the slots from ROUTER to SHARE."""
    active, shared = spec.router.active, 0 if spec.shared is None else spec.shared.width
    hidden, share = active * spec.expert.width, int(spec.shared_gate)
    return spec.router.experts, hidden, hidden, active * dim, shared, shared, share * dim, share


def mixtures_of(config: DecoderConfig) -> list[MoE]:
    """The distinct mixtures of all layers."""
    return list(dict.fromkeys(layer.ffn for layer in config.layers if isinstance(layer.ffn, MoE)))
