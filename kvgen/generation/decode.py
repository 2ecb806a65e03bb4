"""The one decoding loop. It hands the model the whole sequence each time and knows nothing of text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvgen.contract import Backend, Model
from kvgen.errors import ContextError, ModelError, UsageError
from kvgen.generation.drafts import Drafter
from kvgen.generation.sampling import Sampler, one_thread
from kvgen.generation.settings import DEFAULT_KEEP_FIRST

FinishReason = Literal["eos", "stop", "length", "context"]
"""Why a completion ended: an end token, a stop text, the most tokens asked for, or the model's context is full."""


@dataclass(frozen=True)
class Step:
    """One pass of the loop.

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


def ids_tensor(backend: Backend, ids: Sequence[int]) -> Tensor:
    """`ids` as a model takes them, (1, n) int64 on its device. Raises UsageError for one outside its vocabulary."""
    vocabulary = backend.vocab_size
    outside = next((id_ for id_ in ids if id_ < 0 or (vocabulary is not None and id_ >= vocabulary)), None)
    if outside is not None:
        raise UsageError(f"token id {outside} is outside the model's vocabulary of {vocabulary}")
    return torch.tensor([list(ids)], dtype=torch.int64, device=backend.device)


class Decoding:
    """One sequence on its way: what to hand to the model next, and what becomes of the logits.

    It knows no cache and no other sequence, so that one alone and many side by side are decoded by the same code.
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
        """most_drafts: how many drafts the model can judge behind a sequence of a length. The rest as for `decode`.

        Raises UsageError for a prompt that is empty or fills the context.
        """
        check_prompt(ids.shape[1], limits)
        self.finished = False
        self._text, self._prompt_length = _Sequence(ids, limits), ids.shape[1]
        self._end = ids.shape[1] + limits.max_tokens
        self._sampler, self._limits, self._top_logprobs = sampler, limits, top_logprobs
        self._drafter, self._most_drafts = drafter, most_drafts
        self._drafts: list[int] = []

    def ahead(self) -> Tensor:
        """The whole sequence for the next pass, drafts at its end: (1, n)."""
        text = self._text
        text.forget()
        if self._drafter is not None:
            fitting = min(self._end - text.length - 1, text.room, self._most_drafts(text.length - text.forgotten))
            self._drafts = self._drafter.draft(text.tokens, fitting)
        return text.ahead(self._drafts)

    @property
    def count(self) -> int:
        """Of how many positions at the end of `ahead` the logits are wanted."""
        return len(self._drafts) + 1

    def take(self, logits: Tensor, reused: int | None) -> Iterator[Step]:
        """Choose tokens from the pass over what `ahead` gave. logits: (count, vocab). The rest as in `Step`.

        Raises ModelError for logits that are not numbers.
        """
        text, drafts = self._text, self._drafts
        start = text.length
        for guess, at in zip([*drafts, None], logits, strict=True):
            length = text.length
            token, logprob, top = self._choose(at)
            text.append(token)
            finish = self._finish_reason(token)
            self.finished = finish is not None
            read = length - text.forgotten
            if length == start:
                yield Step(token, read, reused, finish, logprob, top, drafted=len(drafts))
            else:
                yield Step(token, read, read, finish, logprob, top, guessed=True)
            if finish:
                return
            if token != guess:
                break
        if drafts and self._drafter:
            self._drafter.learn(len(drafts), text.length - start - 1)

    def _choose(self, logits: Tensor) -> tuple[int, float | None, tuple[tuple[int, float], ...]]:
        """The next token from logits, (vocab,), and the log-probabilities that are wanted, as in `Step`."""
        with one_thread():
            last = logits.to("cpu", torch.float32)
            if not math.isfinite(float(last.max())):
                raise ModelError(f"the model's logits after {self._text.length} positions are not finite numbers")
            token = self._sampler(last, self._text.ids[0].cpu(), self._prompt_length)
            return token, *((None, ()) if self._top_logprobs is None else _logprobs(last, token, self._top_logprobs))

    def _finish_reason(self, token: int) -> FinishReason | None:
        if token in self._limits.eos_ids:
            return "eos"
        if self._text.length == self._end:
            return "length"
        return "context" if self._text.length == self._limits.end_of_context else None


def decode(
    model: Model,
    ids: Tensor,
    sampler: Sampler,
    limits: Limits,
    *,
    use_cache: bool = True,
    cache: Any = None,
    on_cache: Callable[[Any], None] = lambda cache: None,
    top_logprobs: int | None = None,
    drafter: Drafter | None = None,
) -> Iterator[Step]:
    """Decode from the prompt `ids`, (1, n) int64, one token a step.

    use_cache: False hands in None on every step; nothing else changes.
    cache: from an earlier call with this model, to go on from.
    on_cache: called after each pass with the cache that it returned. No step keeps it: a model may return a new one
        each time.
    top_logprobs: how many of the most likely tokens to report; 0 for the chosen one alone, None for no
        log-probabilities.
    drafter: guesses tokens, which the model then judges in one pass. Each token is chosen by the sampler from the
        logits that it would see without guesses, so the completion is the same one.

    Raises UsageError for a prompt that is empty or fills the context, or for drafts and a model that cannot judge
    them, ModelError for logits that are not numbers.
    """
    judge = None if drafter is None else check_judge(model, use_cache)
    most_drafts = judge.most_drafts if judge else lambda length: 0
    decoding = Decoding(ids, sampler, limits, top_logprobs=top_logprobs, drafter=drafter, most_drafts=most_drafts)
    while not decoding.finished:
        sequence, count = decoding.ahead(), decoding.count
        if judge and count > 1:
            logits, cache = judge.speculate(sequence, cache, count)
        else:
            logits, cache = model(sequence, cache if use_cache else None)
        on_cache(cache)
        yield from decoding.take(logits[0, -count:], getattr(cache, "reused", None) if use_cache else 0)


class _Sequence:
    """Ids that grow, and what may follow them, without a copy of the past for each.

    forgotten: how many tokens behind the first `keep_first` the model does not see any more.
    """

    def __init__(self, ids: Tensor, limits: Limits) -> None:
        self._buffer = ids  # the caller's until something is added
        self._most, self._keep = limits.max_context or sys.maxsize, limits.keep_first
        self.forgotten = 0
        self.tokens: list[int] = ids[0].tolist()

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> Tensor:
        """All of them, (1, length)."""
        return self._buffer[:, : self.length]

    @property
    def room(self) -> int:
        """How many tokens may follow before something must be forgotten."""
        return self._most - self.length + self.forgotten

    def forget(self) -> None:
        """Once as many are seen as may be, half of those that may be forgotten are."""
        if self.room < 0:
            seen = self.length - self._keep
            self.forgotten = seen - max(1, (self._most - self._keep) // 2)

    def ahead(self, drafts: Sequence[int]) -> Tensor:
        """What the model is to see, and behind it drafts: (1, length - forgotten + len(drafts))."""
        total = self.length + len(drafts)
        self._write(drafts)
        if not self.forgotten:
            return self._buffer[:, :total]
        return torch.cat((self._buffer[:, : self._keep], self._buffer[:, self._keep + self.forgotten : total]), dim=1)

    def append(self, token: int) -> None:
        self._write([token])
        self.tokens.append(token)

    def _write(self, tokens: Sequence[int]) -> None:
        """Put tokens behind the ids, without counting them."""
        end = self.length + len(tokens)
        if end > self._buffer.shape[1]:
            self._buffer = torch.cat((self._buffer, self._buffer.new_empty(1, end)), dim=1)
        if tokens:
            self._buffer[0, self.length : end] = torch.tensor(tokens)


def check_judge(model: Model, use_cache: bool) -> Backend:
    """The model, as one that judges drafts. Raises UsageError if it is none."""
    if use_cache and isinstance(model, Backend) and model.most_drafts(1):
        return model
    raise UsageError("speculation needs the cache, and kvgen's own decoder without --verify-cache")


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
