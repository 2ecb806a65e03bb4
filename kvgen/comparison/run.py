"""Run a pattern along a given text, or let it decode freely; time uncached decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvgen.comparison.case import Case
from kvgen.contract import Model, one_by_one
from kvgen.generation.completion import Completion, Limits
from kvgen.generation.counts import total
from kvgen.generation.loop import Row, decode
from kvgen.generation.sampling import make_sampler
from kvgen.generation.settings import Sampling

_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Run:
    """One run of a pattern.

    tokens: the tokens after the prompt. logits: (steps, vocab) on the CPU. seconds: total.
    computed: positions computed; None if the cache does not report them. cache: the cache after the last step.
    """

    tokens: tuple[int, ...]
    logits: Tensor
    seconds: float
    computed: int | None
    cache: Any


def run_forced(model: Model, ids: Tensor, start: int, lengths: Sequence[int] | None = None, cache: Any = None) -> Run:
    """Feed `ids`, (1, n), to a pattern: the first `start` positions at once, then one more on each step.

    lengths: sequence length of each call, to use other chunks. cache: of an earlier run on the same text.
    """
    rows = []
    computed: int | None = 0
    began = time.perf_counter()
    for length in range(start, ids.shape[1]) if lengths is None else lengths:
        logits, cache = model(ids[:, :length], cache)
        rows.append(logits[0, -1].cpu())
        computed = total((computed, getattr(cache, "computed", None)))
    return Run(tuple(ids[0, start:].tolist()), torch.stack(rows), time.perf_counter() - began, computed, cache)


def run_free(model: Model, prompt: Tensor, steps: int) -> Run:
    """Decode greedily from `prompt`, (1, n), ignoring end-of-text tokens. Raises ModelError if logits are NaN."""
    rows: list[Tensor] = []
    computed: int | None = 0
    last: Any = None

    def recorded(ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        nonlocal computed, last
        logits, last = model(ids, cache)
        rows.append(logits[0, -1].cpu())
        computed = total((computed, getattr(last, "computed", None)))
        return logits, last

    began = time.perf_counter()
    row = Row(completion=Completion(prompt, make_sampler(_GREEDY), Limits(steps)))
    tokens = tuple(step.token for step in decode(one_by_one(recorded), row))
    return Run(tokens, torch.stack(rows), time.perf_counter() - began, computed, last)


def time_uncached(case: Case) -> tuple[float, dict[int, Tensor]]:
    """Estimated seconds of uncached decoding, and the logits of the few steps that were timed, by length."""
    lengths = sorted({case.start, (case.start + case.ids.shape[1] - 1) // 2, case.ids.shape[1] - 1})
    logits, began = {}, time.perf_counter()
    for length in lengths:
        logits[length] = case.subject.uncached(case.ids[:, :length])[0, -1].cpu()
    return (time.perf_counter() - began) / len(lengths) * len(case.lengths), logits
