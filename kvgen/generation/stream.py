"""Generation as a user sees it: a loaded checkpoint and a prompt in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvgen.errors import UsageError
from kvgen.generation.decode import Limits, decode, ids_tensor
from kvgen.generation.drafts import Drafter
from kvgen.generation.sampling import Sampler, make_sampler
from kvgen.generation.settings import (
    DEFAULT_KEEP_FIRST,
    DEFAULT_MAX_TOKENS,
    DEFAULT_SAMPLING,
    Constraint,
    Request,
    Sampling,
    are_ids,
)
from kvgen.generation.text import Chunk, to_chunks
from kvgen.loading import Loaded


def stream(
    loaded: Loaded,
    prompt: str | Sequence[int],
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    stop: str | Sequence[str] = (),
    use_cache: bool = True,
    cache: Any = None,
    on_cache: Callable[[Any], None] = lambda cache: None,
    top_logprobs: int | None = None,
    drafter: Drafter | None = None,
    max_context: int | None = None,
    keep_first: int = DEFAULT_KEEP_FIRST,
    constraint: Constraint | None = None,
) -> Iterator[Chunk]:
    """Complete a prompt; one chunk for each token, as soon as it is there.

    prompt: text, in which nothing counts as a special token; or token ids, from `loaded.tokenizer.encode` or
        `encode_chat`.
    max_tokens, stop, top_logprobs, max_context, keep_first, constraint: as in `Request`.
    use_cache: False computes every position anew on each step.
    cache: what `on_cache` was last called with in an earlier completion, from this checkpoint. What it shares with
        this prompt is not computed again.
    on_cache: called after each pass with the cache that covers all before its tokens.
    drafter: guesses what comes next: `PromptLookup()`, or `DraftModel(loaded.model)` of a smaller model. A new one
        for each completion. The completion is the same; see `Step.drafted`.

    Raises UsageError for a prompt or a setting that cannot be used. Nothing is computed before the first chunk
    is asked for.
    """
    ids = text_ids(loaded, prompt)
    request = Request(ids, sampling, max_tokens, stop, top_logprobs, max_context, keep_first, constraint)
    return complete(loaded, request, use_cache=use_cache, cache=cache, on_cache=on_cache, drafter=drafter)


def text_ids(loaded: Loaded, text: str | Sequence[int]) -> list[int]:
    """The token ids of a text, in which nothing counts as a special token; ids as they are. Raises UsageError."""
    if not isinstance(loaded, Loaded):
        raise UsageError(f"loaded is of type {type(loaded).__name__}; give what kvgen.load returns")
    if isinstance(text, str):
        return loaded.tokenizer.encode(text)
    if not are_ids(text):
        raise UsageError(f"the text is of type {type(text).__name__}; give a str, or token ids")
    return list(text)


def complete(
    loaded: Loaded,
    request: Request,
    *,
    use_cache: bool = True,
    cache: Any = None,
    on_cache: Callable[[Any], None] = lambda cache: None,
    drafter: Drafter | None = None,
) -> Iterator[Chunk]:
    """`stream`, of what is asked in a request."""
    steps = decode(
        loaded.model,
        ids_tensor(loaded.model, request.prompt),
        sampler_for(loaded, request),
        limits(loaded, request),
        use_cache=use_cache,
        cache=cache,
        on_cache=on_cache,
        top_logprobs=request.top_logprobs,
        drafter=drafter,
    )
    return to_chunks(steps, loaded.tokenizer, request.stop)


def sampler_for(loaded: Loaded, request: Request) -> Sampler:
    """What chooses the tokens of one completion."""
    sampler = make_sampler(request.sampling)
    if request.constraint is None:
        return sampler
    from kvgen.generation.constraint import constrained  # llguidance takes time to import

    return constrained(sampler, request.constraint, loaded.tokenizer, loaded.model.vocab_size)


def limits(loaded: Loaded, request: Request) -> Limits:
    """When the loop is to end."""
    eos_ids, context_length = loaded.tokenizer.eos_ids, loaded.model.context_length
    return Limits(request.most_tokens, eos_ids, context_length, request.max_context, request.keep_first)


def generate(loaded: Loaded, prompt: str | Sequence[int], sampling: Sampling = DEFAULT_SAMPLING, **options: Any) -> str:
    """The whole completion of a prompt. `options` are those of `stream`."""
    return "".join(chunk.text for chunk in stream(loaded, prompt, sampling, **options))
