"""Running a pattern: forced along a given text, and by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvgen.contract import Model, one_by_one
from kvgen.errors import KvgenError
from kvgen.generation.completion import Completion, Limits
from kvgen.generation.loop import Row, decode_step
from kvgen.generation.sampling import make_sampler
from kvgen.generation.settings import Sampling

_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Run:
    """A pattern on a text, one token a step.

    tokens: that the text goes on with. logits: after each step, (steps, vocab) on the CPU. seconds: for all steps.
    computed: positions computed; None if the cache does not say.
    """

    tokens: tuple[int, ...]
    logits: Tensor
    seconds: float
    computed: int | None


def run_forced(model: Model, ids: Tensor, start: int, lengths: Sequence[int] | None = None) -> Run:
    """Feed `ids`, (1, n), to a pattern: the first `start` positions at once, then one more on each step.

    lengths: how many positions to hand over on each call, if other ones.
    """
    rows, cache = [], None
    computed: int | None = 0
    began = time.perf_counter()
    for length in range(start, ids.shape[1]) if lengths is None else lengths:
        logits, cache = model(ids[:, :length], cache)
        rows.append(logits[0, -1].cpu())
        new = getattr(cache, "computed", None)
        computed = None if computed is None or new is None else computed + new
    return Run(tuple(ids[0, start:].tolist()), torch.stack(rows), time.perf_counter() - began, computed)


def run_free(model: Model, prompt: Tensor, steps: int) -> Run:
    """Let a pattern decode greedily from `prompt`, (1, n). It goes on behind tokens that end a text.

    Raises ModelError for logits that are not numbers.
    """
    rows: list[Tensor] = []
    computed: int | None = 0

    def recorded(ids: Tensor, cache: Any = None, /) -> tuple[Tensor, Any]:
        nonlocal computed
        logits, cache = model(ids, cache)
        rows.append(logits[0, -1].cpu())
        new = getattr(cache, "computed", None)
        computed = None if computed is None or new is None else computed + new
        return logits, cache

    began = time.perf_counter()
    row = Row(completion=Completion(prompt, make_sampler(_GREEDY), Limits(steps)))
    while not row.completion.finished:
        for _, step in decode_step(one_by_one(recorded), [row]):
            if isinstance(step, KvgenError):
                raise step
    tokens = tuple(row.completion.tokens[prompt.shape[1] :])
    return Run(tokens, torch.stack(rows), time.perf_counter() - began, computed)
