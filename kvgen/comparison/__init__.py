"""Compare ways of calling a model with its KV cache, by their logits: a verdict and a reason for each.

Only `subjects/` knows particular backends.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvgen.comparison.comparison import Comparison, compare_ids
from kvgen.comparison.probes import Progress
from kvgen.errors import UsageError
from kvgen.generation.settings import is_whole
from kvgen.generation.stream import text_ids
from kvgen.loading.load import Loaded

__all__ = ["Comparison", "compare"]


def compare(
    loaded: Loaded,
    prompt: str | Sequence[int] = "Once upon a time,",
    *,
    patterns: Sequence[str] = ("full-sequence",),
    steps: int = 32,
    continuation: str | Sequence[int] | None = None,
    thorough: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare cached with uncached decoding, as `kvgen compare` does.

        >>> kvgen.compare(loaded, "Once upon a time,").acceptable
        True

    prompt: text or token ids. steps: how many tokens to decode after it.
    patterns: ways of calling the model. `full-sequence` and `batched` should match uncached decoding; others, such as
        `last-token`, are wrong on purpose and show what a common mistake does.
    continuation: tokens to feed after the prompt; None for the greedy choice of uncached decoding.
    thorough: also try long texts, every window, many chunk sizes, edits far back, saved caches, padding and more rows;
        this takes minutes. progress: called before each of these uses, with its name, its number and their number.

    `Comparison.acceptable` is the verdict on the patterns that should be right; `Comparison.rows` has every result.

    Raises UsageError for arguments that cannot be compared, ModelError if uncached logits are NaN.
    """
    ids = text_ids(loaded, prompt)
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not is_whole(steps):
        raise UsageError(f"steps is {steps!r}; it must be a whole number")
    forced = None if continuation is None else text_ids(loaded, continuation)
    return compare_ids(
        loaded.model,
        ids,
        patterns=patterns,
        steps=steps if forced is None else min(steps, len(forced)),
        continuation=forced,
        special_ids=loaded.tokenizer.special_ids | loaded.tokenizer.eos_ids,
        thorough=thorough,
        progress=progress,
    )
