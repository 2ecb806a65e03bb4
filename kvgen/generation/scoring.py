"""The log-likelihood of a text: of each token, given those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvgen.contract import Backend
from kvgen.errors import ModelError, UsageError
from kvgen.generation.settings import is_whole
from kvgen.generation.stream import text_ids
from kvgen.loading.load import Loaded

DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Score:
    """What a model makes of a text.

    logprobs: in nats, one for each of `ids`; None for a token that nothing stands before, -inf for one that the model
    rules out. window, stride: in tokens; see `score`.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    window: int
    stride: int

    @property
    def count(self) -> int:
        """Tokens that are scored."""
        return sum(value is not None for value in self.logprobs)

    @property
    def total(self) -> float:
        """The log-likelihood of the tokens that are scored, in nats; summed without rounding in between."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp(-total / count); infinite where float64 ends."""
        try:
            return math.exp(-self.total / self.count)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, tokens: int, size: int) -> float:
        """Surprise by length of text, which unlike perplexity compares models with different vocabularies.

        tokens: that the text itself has, without BOS and EOS; scored or not. size: of the text, in bytes of UTF-8.
        It is (tokens / size) * (-total / count) / ln 2, in bits: section 3.1 of "The Pile", arXiv:2101.00027. So tokens
        that are not scored are taken to be as surprising as the others.
        """
        return tokens / size * -self.total / self.count / math.log(2)


def score(
    loaded: Loaded,
    text: str | Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score a text in windows, as in the guide "Perplexity of fixed-length models" of transformers.

    text: as for `generate`; or the token ids of the whole text, BOS and EOS included.
    window: tokens that the model sees at once; None for its context, at most 2048. stride: tokens from the start of one
    window to that of the next; None for half a window. A token is scored in the first window that holds it, so it has
    at least window - stride tokens before it, beyond the first window. With stride = window, windows are independent,
    and the first token of each is not scored.
    progress: told after each window how many tokens are done, of how many.

    Raises UsageError for a text of one token, for ids outside the vocabulary, or for sizes that do not fit, ModelError
    for logits that are not numbers.
    """
    for name, size in (("window", window), ("stride", stride)):
        if size is not None and not is_whole(size):
            raise UsageError(f"{name} is {size!r}; it must be a whole number of tokens, or None")
    ids = text_ids(loaded, text)
    return score_ids(loaded.model, ids, window=window, stride=stride, progress=progress)


def score_ids(
    model: Backend,
    ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """`score` of token ids, with a model that need not have a tokenizer."""
    longest = model.context_length  # None: any window fits
    if window is None:
        window = DEFAULT_WINDOW if longest is None else min(longest, DEFAULT_WINDOW)
    stride = max(1, window // 2) if stride is None else stride
    if len(ids) < 2:
        raise UsageError("a text needs at least two tokens to be scored: the first is given")
    if window < 2 or (longest is not None and window > longest):
        sizes = "2 or more" if longest is None else f"2 to {longest}"
        raise UsageError(f"a window of {window} tokens does not fit: it can be {sizes}")
    if not 1 <= stride <= window:
        raise UsageError(f"a stride of {stride} tokens does not fit: it can be 1 to the window, {window}")
    logprobs: list[float | None] = [None] * len(ids)
    for begin, first, end in windows(len(ids), window, stride):
        first = max(first, begin + 1)  # nothing stands before the first token of a window
        if first < end:
            logprobs[first:end] = _logprobs(model, model.ids_tensor(ids[begin:end]), first - begin)
        progress(end, len(ids))
    return Score(tuple(ids), tuple(logprobs), window, stride)


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """For each window its begin, the first token that no window before it holds, and its end."""
    first = 0
    for begin in range(0, count, stride):
        end = min(begin + window, count)
        yield begin, first, end
        first = end
        if end == count:
            return


@torch.inference_mode()
def _logprobs(model: Backend, text: Tensor, first: int) -> list[float]:
    """Log-probabilities of the tokens of `text`, (1, n) int64, from index `first` on, at least 1."""
    found: list[float] = []
    positions = range(first - 1, text.shape[1] - 1)
    for logits in model.each_logits(text[:, :-1], positions) or _step_by_step(model, text, positions):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        start = first + len(found)
        targets = text[0, start : start + len(logits), None]
        if int(targets.max()) >= logits.shape[1]:
            raise ModelError(f"the model gives {logits.shape[1]} logits, too few for token id {int(targets.max())}")
        chosen = torch.log_softmax(wide, dim=-1).gather(1, targets)[:, 0]
        if chosen.isnan().any():
            raise ModelError("the model's logits for this text are not finite numbers")
        found += chosen.tolist()
    return found


def _step_by_step(model: Backend, text: Tensor, positions: Iterable[int]) -> Iterator[Tensor]:
    """Logits after each position, (1, vocab), of a model that gives those of the last one alone."""
    cache: Any = None
    for position in positions:
        logits, cache = model(text[:, : position + 1], cache)
        yield logits[0, -1:]
