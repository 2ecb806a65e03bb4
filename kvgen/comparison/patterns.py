"""The ways to call a model with a cache: the right one, and wrong ones that people write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvgen.comparison.subjects import Subject
from kvgen.contract import Model

_PADS = 4
_RENEWED = 4  # steps after which a sequence beside is begun anew


@dataclass(frozen=True)
class Pattern:
    """A way to call a model.

    call: makes of a subject something with the contract's signature, so that the one decoding loop runs it.
    summary: what it hands the model. For a wrong one, advice: what to write instead, and harmless: why it does no
        harm on a model where it does none.
    right: whether its logits must equal uncached ones.
    """

    name: str
    summary: str
    call: Callable[[Subject], Model]
    advice: str = ""
    harmless: str = ""

    @property
    def right(self) -> bool:
        return not self.advice


def _uncached(subject: Subject) -> Model:
    return lambda ids, cache=None: (subject(ids, None)[0], None)


def _full_sequence(subject: Subject) -> Model:
    return subject


def _last_token(subject: Subject) -> Model:
    return lambda ids, cache=None: subject.trusting(ids if cache is None else ids[:, -1:], cache)


def _stale_chunk(subject: Subject) -> Model:
    def call(ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        if cache is None and ids.shape[1] > 1:
            _, cache = subject.by_default(ids[:, : ids.shape[1] // 2], None)
        return subject.by_default(ids, cache)

    return call


def _wrong_offset(subject: Subject) -> Model:
    def call(ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        positions = torch.arange(ids.shape[1], device=ids.device)
        if cache is not None:
            positions[-1] += 1
        return subject.placed(ids, cache, positions)

    return call


def _left_pad_ignored(subject: Subject) -> Model:
    return lambda ids, cache=None: subject(torch.cat((ids.new_zeros(ids.shape[0], _PADS), ids), dim=1), cache)


@dataclass
class _Side:
    """The caches of a sequence and of those beside it."""

    own: Any
    others: list[Any]
    reused: int | None
    computed: int | None


def _batched(subject: Subject) -> Model:
    """Three sequences stand beside: one shorter, one that goes elsewhere, and one that ends and is begun anew."""

    def call(ids: Tensor, cache: _Side | None = None, /) -> tuple[Tensor, _Side]:
        length = ids.shape[1]
        beside = [ids[:, : length // 2 + 1], ids.flip(1), ids[:, length // 3 :]]
        known = [None] * 3 if cache is None else cache.others
        if length % _RENEWED == 0:
            known = [*known[:2], None]
        given = [None if cache is None else cache.own, *known]
        logits, (own, *others) = subject.forward_batch([ids, *beside], given, [1] * 4)
        return logits[0][None], _Side(own, others, getattr(own, "reused", None), getattr(own, "computed", None))

    return call


UNCACHED = Pattern("uncached", "the whole sequence, no cache", _uncached)
FULL_SEQUENCE = Pattern("full-sequence", "the whole sequence, and the cache", _full_sequence)
LAST_TOKEN = Pattern(
    "last-token",
    "the prompt, then only the last token with the cache",
    _last_token,
    "Hand the whole sequence to the model on every step, with the cache: model(ids, cache=cache).",
    "Harmless on this model: it takes no positions from the length of what it is handed. They come from the shapes "
    "of keys and queries, as with ALiBi and relative biases, or there are none.",
)

PATTERNS: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        UNCACHED,
        FULL_SEQUENCE,
        LAST_TOKEN,
        Pattern("batched", "the same, beside three other sequences", _batched),
        Pattern(
            "stale-chunk",
            "the prompt in two parts, by the library's defaults",
            _stale_chunk,
            "Tell the library how many positions are new; in x-transformers cache_age = n - cache.cache_length.",
            "Harmless on this model: it finds out by itself how many positions are new, and computes all of them.",
        ),
        Pattern(
            "wrong-offset",
            "the newest token one position too far",
            _wrong_offset,
            "Count positions from 0 over the whole sequence: the newest of n tokens is at n - 1.",
            "Harmless on this model: it does not read the positions that it is given.",
        ),
        Pattern(
            "left-pad-ignored",
            f"{_PADS} padding tokens on the left, read as text",
            _left_pad_ignored,
            "Mask padding and do not count it as positions, or do not pad: decode sequences of one length.",
            "Harmless on this model: what stands in front does not change what follows.",
        ),
    )
}
