"""Running a pattern: forced along a given text, and by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgen.contract import Model
from kvgen.generation.decode import Limits, decode
from kvgen.generation.sampling import make_sampler
from kvgen.generation.settings import Sampling

_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Forced:
    """A pattern fed a text token by token.

    logits: after each step, (steps, vocab) on the CPU. seconds: for all steps.
    computed: positions computed; None if the cache does not say.
    """

    logits: Tensor
    seconds: float
    computed: int | None


@dataclass(frozen=True)
class Free:
    """What a pattern decodes by itself: the tokens, and how far the top two were apart at each step."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


def run_forced(model: Model, ids: Tensor, start: int, *, use_cache: bool = True) -> Forced:
    """Feed `ids`, (1, n), to a pattern: the first `start` positions at once, then one more on each step."""
    rows, cache = [], None
    computed: int | None = 0
    began = time.perf_counter()
    for length in range(start, ids.shape[1]):
        logits, cache = model(ids[:, :length], cache)
        rows.append(logits[0, -1].cpu())
        new = getattr(cache, "computed", None) if use_cache else length
        computed = None if computed is None or new is None else computed + new
    return Forced(torch.stack(rows), time.perf_counter() - began, computed)


def run_free(model: Model, prompt: Tensor, steps: int, eos_ids: frozenset[int]) -> Free:
    """Let a pattern decode greedily from `prompt`, (1, n)."""
    found = decode(model, prompt, make_sampler(_GREEDY), Limits(steps, eos_ids), top_logprobs=2)
    taken = [(step.token, step.top_logprobs[0][1] - step.top_logprobs[1][1]) for step in found]
    return Free(tuple(token for token, _ in taken), tuple(margin for _, margin in taken))
