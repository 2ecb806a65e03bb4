"""Generation as a user sees it: a loaded checkpoint and a prompt in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvgen.errors import UsageError
from kvgen.generation.batch import Batch
from kvgen.generation.drafts import Drafter
from kvgen.generation.settings import (
    DEFAULT_KEEP_FIRST,
    DEFAULT_MAX_TOKENS,
    DEFAULT_SAMPLING,
    Constraint,
    Request,
    Sampling,
    are_ids,
)
from kvgen.generation.text import Chunk
from kvgen.loading.load import Loaded


def stream(
    loaded: Loaded,
    prompt: str | Sequence[int],
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    stop: str | Sequence[str] = (),
    use_cache: bool = True,
    top_logprobs: int | None = None,
    drafter: Drafter | None = None,
    max_context: int | None = None,
    keep_first: int = DEFAULT_KEEP_FIRST,
    constraint: Constraint | None = None,
) -> Iterator[Chunk]:
    """Complete a prompt; yield one chunk for each token, as soon as it is there.

        >>> for chunk in kvgen.stream(loaded, "Once upon a time,", max_tokens=20):
        ...     print(chunk.text, end="")

    prompt: text, in which nothing counts as a special token; or token ids, from `loaded.tokenizer.encode` or
        `encode_chat`.
    max_tokens, stop, top_logprobs, max_context, keep_first, constraint: as in `Request`.
    use_cache: False computes every position anew on each step.
    drafter: guesses what comes next: `PromptLookup()`, or `DraftModel(loaded.model)` of a smaller model. A new one
        for each completion. The completion is the same; see `Step.drafted`.

    To go on from the cache of an earlier completion, use `Batch.complete`. Raises UsageError for a prompt or a setting
    that cannot be used. Nothing is computed before the first chunk is asked for.
    """
    request = Request(
        text_ids(loaded, prompt), sampling, max_tokens, stop, top_logprobs, max_context, keep_first, constraint
    )
    make_drafter = None if drafter is None else lambda: drafter
    return Batch(loaded, batch_size=1, use_cache=use_cache, make_drafter=make_drafter).complete(request)


def generate(loaded: Loaded, prompt: str | Sequence[int], sampling: Sampling = DEFAULT_SAMPLING, **options: Any) -> str:
    """The whole completion of a prompt. `options` are those of `stream`."""
    return "".join(chunk.text for chunk in stream(loaded, prompt, sampling, **options))


def text_ids(loaded: Loaded, text: str | Sequence[int]) -> list[int]:
    """The token ids of a text, in which nothing counts as a special token; ids as they are. Raises UsageError."""
    if not isinstance(loaded, Loaded):
        raise UsageError(f"loaded is of type {type(loaded).__name__}; give what kvgen.load returns")
    if isinstance(text, str):
        return loaded.tokenizer.encode(text)
    if not are_ids(text):
        raise UsageError(f"the text is of type {type(text).__name__}; give a str, or token ids")
    return list(text)
