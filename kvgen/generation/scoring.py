"""The log-likelihood of a text: of each token, given those before it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvgen.contract import Backend
from kvgen.errors import ModelError, UsageError
from kvgen.generation.scores import Score
from kvgen.generation.settings import is_whole
from kvgen.generation.stream import text_ids
from kvgen.loading.load import Loaded

DEFAULT_WINDOW = 2048


def score(
    loaded: Loaded,
    text: str | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score a text in windows, as in transformers' guide "Perplexity of fixed-length models".

        >>> [None if value is None else round(value, 2) for value in kvgen.score(loaded, "Hello, world!").logprobs]
        [None, -2.42, -9.51, -5.98]

    text: as for `generate`; or the token ids of the whole text, BOS and EOS included.
    window: tokens that the model sees at once; None for its context, at most 2048. stride: tokens from the start of a
    window to the start of the next; None for half a window. A token is scored in the first window that holds it, so it
    has at least window - stride tokens before it, except in the first window. With stride = window, windows are
    independent, and the first token of each is not scored.
    progress: called after each window with the number of tokens done, and in total.

    Raises UsageError for a text of one token, ids outside the vocabulary or invalid sizes, ModelError for logits that
    are not finite.
    """
    steps = score_steps(loaded, text, window=window, stride=stride)
    while True:
        try:
            progress(*next(steps))
        except StopIteration as ended:
            result: Score = ended.value
            return result


def score_steps(
    loaded: Loaded, text: str | Sequence[int], *, window: int | None = None, stride: int | None = None
) -> Generator[tuple[int, int], None, Score]:
    """Score a text as `score` does; yield the number of tokens done, and in total, after each window."""
    for name, size in (("window", window), ("stride", stride)):
        if size is not None and not is_whole(size):
            raise UsageError(f"{name} is {size!r}; it must be a whole number of tokens, or None")
    ids = text_ids(loaded, text)
    model = loaded.model
    longest = model.context_length  # None: unbounded
    if window is None:
        window = DEFAULT_WINDOW if longest is None else min(longest, DEFAULT_WINDOW)
    stride = max(1, window // 2) if stride is None else stride
    if len(ids) < 2:
        raise UsageError("a text needs at least two tokens to be scored: the first one has no context")
    if window < 2 or (longest is not None and window > longest):
        sizes = "2 or more" if longest is None else f"2 to {longest}"
        raise UsageError(f"a window of {window} tokens does not fit: it can be {sizes}")
    if not 1 <= stride <= window:
        raise UsageError(f"a stride of {stride} tokens does not fit: it can be 1 to the window, {window}")
    logprobs: list[float | None] = [None] * len(ids)
    for begin, first, end in windows(len(ids), window, stride):
        first = max(first, begin + 1)  # nothing precedes the first token of a window
        if first < end:
            logprobs[first:end] = _logprobs(model, model.ids_tensor(ids[begin:end]), first - begin)
        yield end, len(ids)
    return Score(tuple(ids), tuple(logprobs), window, stride)


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield for each window its start, its first token that is in no earlier window, and its end."""
    first = 0
    for begin in range(0, count, stride):
        end = min(begin + window, count)
        yield begin, first, end
        first = end
        if end == count:
            return


@torch.inference_mode()
def _logprobs(model: Backend, text: Tensor, first: int) -> list[float]:
    """Return the log-probabilities of the tokens of `text`, (1, n) int64, from index `first` >= 1."""
    found: list[float] = []
    positions = range(first - 1, text.shape[1] - 1)
    for logits in model.each_logits(text[:, :-1], positions) or _decode_logits(model, text, positions):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        start = first + len(found)
        targets = text[0, start : start + len(logits), None].to(logits.device)
        if int(targets.max()) >= logits.shape[1]:
            raise ModelError(f"the model gives {logits.shape[1]} logits, too few for token id {int(targets.max())}")
        chosen = torch.log_softmax(wide, dim=-1).gather(1, targets)[:, 0]
        if chosen.isnan().any():
            raise ModelError("the model's logits for this text are not finite numbers")
        found += chosen.tolist()
    return found


def _decode_logits(model: Backend, text: Tensor, positions: Iterable[int]) -> Iterator[Tensor]:
    """Yield the logits after each position, (1, vocab), step by step: for models that return only the last ones."""
    cache: Any = None
    for position in positions:
        logits, cache = model(text[:, : position + 1], cache)
        yield logits[0, -1:]
