"""Patterns: ways to call a model with a cache, right ones and common mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvgen.comparison.subjects import Subject
from kvgen.contract import Model

_PADS = 4
_RESTART_EVERY = 4  # steps after which a neighbouring sequence starts again


@dataclass(frozen=True)
class Pattern:
    """A way to call a model.

    summary: what it passes to the model. call: turns a subject into a function with the contract's signature.
    advice: what to write instead, for a wrong pattern. harmless: why a wrong pattern can be harmless on some models.
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
    return lambda ids, cache=None: (subject.uncached(ids), None)


def _full_sequence(subject: Subject) -> Model:
    return subject


def _last_token(subject: Subject) -> Model:
    return lambda ids, cache=None: subject.append_unchecked(ids if cache is None else ids[:, -1:], cache)


def _stale_chunk(subject: Subject) -> Model:
    def call(ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        if cache is None and ids.shape[1] > 1:
            _, cache = subject.library_default(ids[:, : ids.shape[1] // 2], None)
        return subject.library_default(ids, cache)

    return call


def _wrong_offset(subject: Subject) -> Model:
    def call(ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        positions = torch.arange(ids.shape[1], device=ids.device)
        if cache is not None:
            positions[-1] += 1
        return subject.with_positions(ids, cache, positions)

    return call


def _left_pad_ignored(subject: Subject) -> Model:
    return lambda ids, cache=None: subject(torch.cat((ids.new_zeros(ids.shape[0], _PADS), ids), dim=1), cache)


@dataclass
class _BatchCache:
    """Caches of a sequence and of its neighbours in the batch."""

    own: Any
    others: list[Any]
    reused: int | None
    computed: int | None


def _batched(subject: Subject) -> Model:
    """Add three neighbours: a shorter one, a different text, and one that restarts every few steps."""

    def call(ids: Tensor, cache: _BatchCache | None = None, /) -> tuple[Tensor, _BatchCache]:
        length = ids.shape[1]
        beside = [ids[:, : length // 2 + 1], ids.flip(1), ids[:, length // 3 :]]
        known = [None] * 3 if cache is None else cache.others
        if length % _RESTART_EVERY == 0:
            known = [*known[:2], None]
        given = [None if cache is None else cache.own, *known]
        logits, (own, *others) = subject.forward_batch([ids, *beside], given, [1] * 4)
        return logits[0][None], _BatchCache(own, others, getattr(own, "reused", None), getattr(own, "computed", None))

    return call


UNCACHED = Pattern("uncached", "the whole sequence, no cache", _uncached)
FULL_SEQUENCE = Pattern("full-sequence", "the whole sequence, with the cache", _full_sequence)
LAST_TOKEN = Pattern(
    "last-token",
    "the prompt, then only the last token with the cache",
    _last_token,
    "Pass the whole sequence on every step, with the cache: model(ids, cache=cache).",
    "Harmless on this model: it does not derive positions from the length of its input. It counts them from what is "
    "cached, takes them from the shapes of keys and queries, as with ALiBi and relative biases, or has none.",
)

PATTERNS: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        UNCACHED,
        FULL_SEQUENCE,
        LAST_TOKEN,
        Pattern("batched", "the whole sequence, with the cache, in a batch with three others", _batched),
        Pattern(
            "stale-chunk",
            "the prompt in two chunks, with the library's defaults",
            _stale_chunk,
            "Tell the library how many positions are new; in x-transformers cache_age = n - cache.cache_length.",
            "Harmless on this model: it works out which positions are new and computes all of them.",
        ),
        Pattern(
            "wrong-offset",
            "the newest token at a position one too high",
            _wrong_offset,
            "Count positions from 0 over the whole sequence: the last of n tokens is at n - 1.",
            "Harmless on this model: it ignores the positions passed to it.",
        ),
        Pattern(
            "left-pad-ignored",
            f"{_PADS} padding tokens on the left, read as text",
            _left_pad_ignored,
            "Mask the padding and leave it out of the positions, or decode sequences of equal length without padding.",
            "Harmless on this model: tokens in front do not change what follows.",
        ),
    )
}
