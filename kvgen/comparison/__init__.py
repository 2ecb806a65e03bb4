"""Is a KV cache right? Patterns of calling a model, compared on their logits, with a verdict and a reason.

Nothing here knows which backend it runs on.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvgen.comparison.comparison import Comparison, compare_ids
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
) -> Comparison:
    """Compare patterns of using the cache with uncached decoding, as `kvgen compare` does.

    prompt: text or token ids that are handed over at once. steps: how many tokens to go on for.
    patterns: `full-sequence` and `batched` must be right; there are wrong ones to see what they do, such as
        `last-token`.
    continuation: the text to force every pattern along, after the prompt; None for what uncached decoding chooses.

    `Comparison.acceptable` is the verdict on the right patterns, `Comparison.rows` what was found of each.

    Raises UsageError for what cannot be compared, ModelError for uncached logits that are not numbers.
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
    )
