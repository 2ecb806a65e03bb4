"""One completion under way: its tokens, when it ends, and what it reports of each step. It knows nothing of text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvgen.errors import ContextError, ModelError, UsageError
from kvgen.generation.drafts import Drafter
from kvgen.generation.sampling import Sampler, one_thread
from kvgen.generation.settings import DEFAULT_KEEP_FIRST

FinishReason = Literal["eos", "stop", "length", "context"]
"""Why a completion ended: an end token, a stop text, the most tokens asked for, or the model's context is full."""


@dataclass(frozen=True)
class Step:
    """One token of a completion.

    token: the id that was chosen.
    positions: the length of the sequence before it. reused: how many of those came from the cache; None if the cache
        does not say.
    drafted: how many tokens were guessed, and computed, behind that sequence.
    guessed: whether the token before this one had been guessed, so that this one came without a pass of its own.
    logprob: natural log-probability of the token under the model, before any filter; None if not asked for.
    top_logprobs: the most likely tokens and their log-probabilities, most likely first.
    """

    token: int
    positions: int
    reused: int | None
    finish_reason: FinishReason | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    drafted: int = 0
    guessed: bool = False

    @property
    def computed(self) -> int | None:
        """How many positions the model computed for this step."""
        return None if self.reused is None else self.positions - self.reused + self.drafted


@dataclass(frozen=True)
class Limits:
    """When the loop ends, and what it forgets.

    It ends after max_tokens, at an id of eos_ids, or when context_length positions are full.
    max_context: the most positions to hand to the model; None for all. When a sequence gets there, its middle is
        forgotten: the first keep_first tokens stay, and the later half of the others. What is left is a shorter text,
        which the model reads anew: lossy, but right for any model and cache.
    """

    max_tokens: int
    eos_ids: Collection[int] = ()
    context_length: int | None = None
    max_context: int | None = None
    keep_first: int = DEFAULT_KEEP_FIRST

    @property
    def end_of_context(self) -> int | None:
        """The length at which nothing more fits; None if something is forgotten before that."""
        return self.context_length if self.max_context is None else None

    def __post_init__(self) -> None:
        most = self.max_context
        if most is None:
            return
        if self.context_length is not None and most > self.context_length:
            raise UsageError(f"max_context is {most}; the model's own context is {self.context_length}")
        if not 0 <= self.keep_first <= most - 2:
            raise UsageError(f"max_context is {most}; it must be at least 2 more than keep_first, {self.keep_first}")


class Completion:
    """One completion under way: what to hand to the model next, and what to make of its logits.

    It knows no cache and no other completion.

    tokens: the prompt and what has been chosen so far. finished: whether the last step had a finish_reason, or failed.
    """

    def __init__(
        self,
        ids: Tensor,
        sampler: Sampler,
        limits: Limits,
        *,
        top_logprobs: int | None = None,
        drafter: Drafter | None = None,
        most_drafts: Callable[[int], int] = lambda length: 0,
    ) -> None:
        """Begin behind a prompt.

        ids: the prompt, (1, n) int64. top_logprobs: how many of the most likely tokens to report; 0 for the chosen one
            alone, None for no log-probabilities.
        drafter: guesses tokens, which the model judges in one pass. Each token is chosen from the logits that it would
            see without guesses, so the completion is the same.
        most_drafts: how many drafts the model can judge behind a sequence of a given length.

        Raises UsageError for an empty prompt, ContextError for one that fills the context.
        """
        check_prompt(ids.shape[1], limits)
        self.tokens: list[int] = ids[0].tolist()
        self.finished = False
        self._ids = ids  # `tokens` for the model, with spare room behind them; the caller's until something is added
        self._prompt_length = len(self.tokens)
        self._end = len(self.tokens) + limits.max_tokens
        self._forgotten = 0  # tokens behind the first `keep_first` that the model does not see any more
        self._sampler, self._limits, self._top_logprobs = sampler, limits, top_logprobs
        self._drafter, self._most_drafts = drafter, most_drafts
        self._drafts: list[int] = []

    def next_ids(self) -> Tensor:
        """The whole sequence for the next pass, with drafts at its end: (1, n)."""
        self._forget()
        length = len(self.tokens)
        if self._drafter is not None:
            seen = length - self._forgotten
            most = min(self._end - length - 1, self._visible - seen, self._most_drafts(seen))
            self._drafts = self._drafter.draft(self.tokens, most)
            self._write(self._drafts)
        end, keep = length + len(self._drafts), self._limits.keep_first
        if not self._forgotten:
            return self._ids[:, :end]
        return torch.cat((self._ids[:, :keep], self._ids[:, keep + self._forgotten : end]), dim=1)

    @property
    def count(self) -> int:
        """At how many positions at the end of `next_ids` the logits are wanted."""
        return len(self._drafts) + 1

    def take(self, logits: Tensor, reused: int | None) -> Iterator[Step]:
        """Choose tokens from the logits of a pass over `next_ids`, (count, vocab). reused: as in `Step`.

        Raises ModelError for logits that are not numbers.
        """
        drafts, start = self._drafts, len(self.tokens)
        for guess, at in zip([*drafts, None], logits, strict=True):
            length = len(self.tokens)
            token, logprob, top = self._choose(at)
            self._write([token])
            self.tokens.append(token)
            finish = self._finish_reason(token)
            self.finished = finish is not None
            seen = length - self._forgotten
            if length == start:
                yield Step(token, seen, reused, finish, logprob, top, drafted=len(drafts))
            else:
                yield Step(token, seen, seen, finish, logprob, top, guessed=True)
            if finish:
                return
            if token != guess:
                break
        if drafts and self._drafter:
            self._drafter.learn(len(drafts), len(self.tokens) - start - 1)

    def _choose(self, logits: Tensor) -> tuple[int, float | None, tuple[tuple[int, float], ...]]:
        """The next token from logits, (vocab,), and the log-probabilities that are wanted, as in `Step`."""
        with one_thread():
            last = logits.to("cpu", torch.float32)
            if not math.isfinite(float(last.max())):
                raise ModelError(f"the model's logits after {len(self.tokens)} positions are not finite numbers")
            token = self._sampler(last, self.tokens, self._prompt_length)
            return token, *((None, ()) if self._top_logprobs is None else _logprobs(last, token, self._top_logprobs))

    def _finish_reason(self, token: int) -> FinishReason | None:
        if token in self._limits.eos_ids:
            return "eos"
        if len(self.tokens) == self._end:
            return "length"
        return "context" if len(self.tokens) == self._limits.end_of_context else None

    @property
    def _visible(self) -> int:
        """The most tokens that the model may see."""
        return self._limits.max_context or sys.maxsize

    def _forget(self) -> None:
        """Once the model sees as many tokens as it may, half of those that may be forgotten are."""
        seen, keep = len(self.tokens) - self._forgotten, self._limits.keep_first
        if seen > self._visible:
            self._forgotten = len(self.tokens) - keep - max(1, (self._visible - keep) // 2)

    def _write(self, tokens: Sequence[int]) -> None:
        """Put tokens behind the ids, without counting them."""
        length = len(self.tokens)
        end = length + len(tokens)
        if end > self._ids.shape[1]:
            self._ids = torch.cat((self._ids, self._ids.new_empty(1, end)), dim=1)
        if tokens:
            self._ids[0, length:end] = torch.tensor(tokens)


def check_prompt(length: int, limits: Limits) -> None:
    """Raises UsageError for a prompt of so many tokens that is empty, ContextError for one that fills the context."""
    if length == 0:
        raise UsageError("the prompt is empty")
    if limits.end_of_context is not None and length >= limits.end_of_context:
        raise ContextError(
            f"the prompt has {length} tokens, but the model's context has room for {limits.end_of_context}, "
            "completion included"
        )


def _logprobs(logits: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    return float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
