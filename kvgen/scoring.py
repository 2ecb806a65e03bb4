"""The log-likelihood of a text: of each token, given those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvgen.contract import Backend
from kvgen.errors import UsageError
from kvgen.generation.decode import ids_tensor

DEFAULT_WINDOW = 2048
_ROWS = 256  # of logits that are normalized at once: in float32 a large vocabulary takes a megabyte each


@dataclass(frozen=True)
class Score:
    """logprobs: natural logarithms, one for each of `ids`; None for a token that nothing stands before.

    window, stride: in tokens; see `score`.
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
        """The log-likelihood, in nats."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp(-total / count)."""
        return math.exp(min(-self.total / self.count, 700.0))


def score(
    model: Backend,
    ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score a text in windows, as in the guide "Perplexity of fixed-length models" of transformers.

    window: tokens that the model sees at once; None for its context, at most 2048. stride: tokens from the start of one
    window to that of the next; None for half a window. A token is scored in the first window that holds it, so it has
    at least window - stride tokens before it, beyond the first window. With stride = window, windows are independent,
    and the first token of each is not scored.
    progress: told how many tokens are done, of how many.

    Raises UsageError for a text of one token, or for sizes that do not fit.
    """
    longest = model.context_length or max(len(ids), DEFAULT_WINDOW)
    window = min(longest, DEFAULT_WINDOW) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if len(ids) < 2:
        raise UsageError("a text needs at least two tokens to be scored: the first is given")
    if not 2 <= window <= longest:
        raise UsageError(f"a window of {window} tokens does not fit: it can be 2 to {longest}")
    if not 1 <= stride <= window:
        raise UsageError(f"a stride of {stride} tokens does not fit: it can be 1 to the window, {window}")
    logprobs: list[float | None] = [None] * len(ids)
    for begin, first, end in windows(len(ids), window, stride):
        text = ids_tensor(model, ids[begin:end])
        first = max(first, begin + 1)  # nothing stands before the first token of a window
        logprobs[first:end] = _logprobs(model, text, first - begin)
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
    """Log-probabilities of the tokens of `text`, (1, n), from index `first` on, at least 1."""
    logits = model.all_logits(text)
    rows = _one_by_one(model, text, first) if logits is None else logits[0, first - 1 : -1]
    targets = text[0, first:, None]
    found: list[float] = []
    for start in range(0, len(targets), _ROWS):
        part = rows[start : start + _ROWS]
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        chosen = torch.log_softmax(wide, dim=-1).gather(1, targets[start : start + _ROWS])
        found += chosen[:, 0].tolist()
    return found


def _one_by_one(model: Backend, text: Tensor, first: int) -> Tensor:
    """For a model that gives the last position alone: (n - first, vocab)."""
    cache: Any = None
    rows = []
    for length in range(first, text.shape[1]):
        logits, cache = model(text[:, :length], cache)
        rows.append(logits[0, -1])
    return torch.stack(rows)
