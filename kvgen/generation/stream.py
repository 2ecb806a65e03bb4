"""Text generation from a loaded checkpoint: `stream`, `generate` and `chat`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

from typing_extensions import Unpack

from kvgen.errors import UsageError
from kvgen.generation.batch import Batch
from kvgen.generation.drafts import Drafter
from kvgen.generation.settings import DEFAULT_SAMPLING, Constraint, Request, Sampling, are_ids
from kvgen.generation.text import Chunk
from kvgen.loading.load import Loaded
from kvgen.tokenizer.chat import Message


class RequestOptions(TypedDict, total=False):
    """Keyword options for the fields of `Request`."""

    max_tokens: int | None
    stop: str | Sequence[str]
    top_logprobs: int | None
    max_context: int | None
    keep_first: int
    constraint: Constraint | None


class StreamOptions(RequestOptions, total=False):
    """Keyword options of `stream`."""

    use_cache: bool
    drafter: Drafter | None


def stream(
    loaded: Loaded,
    prompt: str | Sequence[int],
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    use_cache: bool = True,
    drafter: Drafter | None = None,
    **options: Unpack[RequestOptions],
) -> Iterator[Chunk]:
    """Complete a prompt; yield a chunk for each token as soon as it is computed.

        >>> chunks = kvgen.stream(loaded, "Once upon a time,", kvgen.Sampling(temperature=0), max_tokens=4)
        >>> [chunk.text for chunk in chunks]
        [' the', ' city', ' of', ' Nova']

    prompt: text, in which special tokens are not parsed; or token ids, from `loaded.tokenizer.encode` or `encode_chat`.
    use_cache: False recomputes every position on each step.
    drafter: speculative decoding, with a new `PromptLookup()`, or `DraftModel(smaller.model)`, for each completion. The
        text stays the same.
    options: as in `Request`: max_tokens, stop, top_logprobs, max_context, keep_first, constraint.

    To continue from the cache of an earlier completion, use `Batch`. Raises UsageError for an invalid prompt or option.
    Nothing is computed before the first chunk is requested.
    """
    request = Request(text_ids(loaded, prompt), sampling, **options)
    make_drafter = None if drafter is None else lambda: drafter
    return Batch(loaded, batch_size=1, use_cache=use_cache, make_drafter=make_drafter).complete(request)


def generate(
    loaded: Loaded,
    prompt: str | Sequence[int],
    sampling: Sampling = DEFAULT_SAMPLING,
    **options: Unpack[StreamOptions],
) -> str:
    """Return the whole completion of a prompt.

        >>> kvgen.generate(loaded, "The capital of France is", kvgen.Sampling(temperature=0), stop=".")
        ' Paris'

    options: as for `stream`: use_cache, drafter, max_tokens, stop, top_logprobs, max_context, keep_first, constraint.
    """
    return "".join(chunk.text for chunk in stream(loaded, prompt, sampling, **options))


def chat(
    loaded: Loaded,
    messages: Sequence[Message],
    sampling: Sampling = DEFAULT_SAMPLING,
    **options: Unpack[StreamOptions],
) -> Iterator[Chunk]:
    """Answer a conversation in the checkpoint's chat template; yield chunks as `stream` does.

        >>> messages = [{"role": "user", "content": "What is the capital of Japan?"}]
        >>> "".join(chunk.text for chunk in kvgen.chat(loaded, messages, kvgen.Sampling(temperature=0)))
        'The capital of Japan is Tokyo.'

    options: as for `generate`. For several turns use `Conversation`, which keeps the cache. Raises UsageError if there
    is no chat template, or if the template refuses the messages.
    """
    _check_loaded(loaded)
    return stream(loaded, loaded.tokenizer.encode_chat(messages), sampling, **options)


def text_ids(loaded: Loaded, text: str | Sequence[int]) -> list[int]:
    """Return the token ids of a text, without parsing special tokens; ids stay as they are. Raises UsageError."""
    _check_loaded(loaded)
    if isinstance(text, str):
        return loaded.tokenizer.encode(text)
    if not are_ids(text):
        raise UsageError(f"the text is of type {type(text).__name__}; give a str, or token ids")
    return list(text)


def _check_loaded(loaded: Loaded) -> None:
    if not isinstance(loaded, Loaded):
        raise UsageError(f"loaded is of type {type(loaded).__name__}; give what kvgen.load returns")
