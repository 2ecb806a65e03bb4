"""The decoding loop over one row, without text: for models that have no tokenizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvgen import Step
from kvgen.contract import Backend, Model, one_by_one
from kvgen.generation.completion import Completion, Limits
from kvgen.generation.loop import Row
from kvgen.generation.loop import decode as decode_row
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
    """Return all steps after a prompt, (1, n). caches: receives the cache after each step."""
    forward = one_by_one(model)
    if isinstance(model, Backend):
        forward, options["max_drafts"] = model.forward_batch, model.max_drafts
    row, steps = Row(completion=Completion(ids, sampler, limits, **options), cache=cache, use_cache=use_cache), []
    for step in decode_row(forward, row):
        steps.append(step)
        if caches is not None:
            caches.append(row.cache)
    return steps
