"""The decoding loop over one row, without text: for models that have no tokenizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvgen import KvgenError, Step
from kvgen.contract import Backend, Model, one_by_one
from kvgen.generation.completion import Completion, Limits
from kvgen.generation.loop import Row, decode_step
from kvgen.generation.sampling import Sampler


def decode(
    model: Model,
    ids: Tensor,
    sampler: Sampler,
    limits: Limits,
    *,
    use_cache: bool = True,
    cache: Any = None,
    caches: list[Any] | None = None,
    **options: Any,
) -> list[Step]:
    """All steps behind a prompt, (1, n). caches: gets the cache after each pass."""
    forward = one_by_one(model)
    if isinstance(model, Backend):
        forward, options["most_drafts"] = model.forward_batch, model.most_drafts
    row, steps = Row(completion=Completion(ids, sampler, limits, **options), cache=cache), []
    while not row.completion.finished:
        for _, step in decode_step(forward, [row], use_cache=use_cache):
            if isinstance(step, KvgenError):
                raise step
            steps.append(step)
        if caches is not None:
            caches.append(row.cache)
    return steps
