"""The buffers of a run, and the slots that operations read and write."""

from __future__ import annotations

from enum import IntEnum, auto
from typing import NamedTuple


class Buffer(IntEnum):
    """Memory of a run."""

    X = 0  # the residual stream
    NORMED = auto()
    Q = auto()
    K = auto()
    V = auto()
    ATTENTION_GATE = auto()
    MIXED = auto()  # output of attention, before its projection
    PROJECTED = auto()  # inputs of a recurrent mixer
    DECAYS = auto()  # what its decays are made of, if it has a projection of its own
    BETAS = auto()
    RECURRENT_GATE = auto()
    CONVOLVED = auto()
    RECURRED = auto()  # its output, before its projection
    PARALLEL = auto()  # outputs of mixers in parallel, added
    OUT = auto()  # output of mixer or MLP, if a norm follows
    GATE = auto()
    UP = auto()
    ROUTER = auto()  # the logits of experts
    LATENT = auto()  # what experts read, if it is not the input
    EXPERT_GATE = auto()  # of the chosen experts of all rows, as (rows * active, width), in the order of experts
    EXPERT_UP = auto()
    EXPERT_OUT = auto()
    EXPERTS = auto()  # their outputs, added
    SHARED_GATE = auto()  # of the shared expert
    SHARED_UP = auto()
    SHARED_OUT = auto()  # its output and its share, if it has a gate
    SHARE = auto()
    LOGITS = auto()


class Slot(NamedTuple):
    """A buffer as (rows, width) fp32. Slots of one buffer share its memory, since layers may have different widths."""

    buffer: Buffer
    width: int
