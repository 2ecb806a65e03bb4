"""The state of one completion: its tokens, when it ends, and the step that each pass yields. Works on ids, not text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgen.errors import ContextError, ModelError, UsageError
from kvgen.generation.drafts import Drafter
from kvgen.generation.sampling import Sampler, one_thread
from kvgen.generation.settings import DEFAULT_KEEP_FIRST
from kvgen.generation.step import FinishReason, Step


@dataclass(frozen=True)
class Limits:
    """When a completion ends: after max_tokens, at an id in eos_ids, or when context_length positions are full.

    max_context: maximum number of positions that the model sees; None for no limit. A longer sequence is cut: the
        first keep_first tokens stay, and the later half of the others. The model then recomputes the shorter text:
        lossy, but right for any model and cache.

    Raises UsageError for a max_context above context_length or below keep_first + 2.
    """

    max_tokens: int
    eos_ids: Collection[int] = ()
    context_length: int | None = None
    max_context: int | None = None
    keep_first: int = DEFAULT_KEEP_FIRST

    def __post_init__(self) -> None:
        limit = self.max_context
        if limit is None:
            return
        if self.context_length is not None and limit > self.context_length:
            raise UsageError(f"max_context is {limit}; the model's context length is {self.context_length}")
        if not 0 <= self.keep_first <= limit - 2:
            raise UsageError(f"max_context is {limit}; it must be at least 2 more than keep_first, {self.keep_first}")

    @property
    def end_of_context(self) -> int | None:
        """Maximum length of the sequence; None if it is unbounded or max_context shortens it."""
        return self.context_length if self.max_context is None else None

    def check_prompt(self, length: int) -> None:
        """Raise UsageError for an empty prompt, ContextError for one that fills the context."""
        if length == 0:
            raise UsageError("the prompt is empty")
        if self.end_of_context is not None and length >= self.end_of_context:
            raise ContextError(
                f"the prompt has {length} tokens, but the model's context has room for {self.end_of_context}, "
                "completion included"
            )


class Completion:
    """One completion in progress: builds the ids for the next pass and chooses tokens from its logits.

    tokens: the prompt and the tokens chosen so far. finished: whether the last step had a finish_reason, or failed.
    """

    def __init__(
        self,
        ids: Tensor,
        sampler: Sampler,
        limits: Limits,
        *,
        top_logprobs: int | None = None,
        drafter: Drafter | None = None,
        max_drafts: Callable[[int], int] = lambda length: 0,
    ) -> None:
        """Start from a prompt, `ids`, (1, n) int64.

        top_logprobs: as in `Request`.
        drafter: proposes tokens, which the model checks in one pass. Each token is chosen from the same logits as
            without drafts, so the completion does not change. max_drafts: as `Backend.max_drafts`.

        Raises UsageError for an empty prompt, ContextError for one that fills the context.
        """
        limits.check_prompt(ids.shape[1])
        self.tokens: list[int] = ids[0].tolist()
        self.finished = False
        self._ids = ids  # `tokens` as a tensor with spare capacity; the caller's tensor until a token is added
        self._prompt_length = len(self.tokens)
        self._end = len(self.tokens) + limits.max_tokens
        self._visible = limits.max_context or sys.maxsize
        self._dropped = 0  # tokens after the first `keep_first` that the model no longer sees
        self._sampler, self._limits, self._top_logprobs = sampler, limits, top_logprobs
        self._drafter, self._max_drafts = drafter, max_drafts
        self._drafts: list[int] = []

    def next_ids(self) -> Tensor:
        """Return the whole sequence for the next pass, followed by drafts: (1, n)."""
        length, keep = len(self.tokens), self._limits.keep_first
        if length - self._dropped > self._visible:
            self._dropped = length - keep - max(1, (self._visible - keep) // 2)
        if self._drafter is not None:
            seen = length - self._dropped
            limit = min(self._end - length - 1, self._visible - seen, self._max_drafts(seen))
            self._drafts = self._drafter.draft(self.tokens, limit)
            self._write(self._drafts)
        end = length + len(self._drafts)
        if not self._dropped:
            return self._ids[:, :end]
        return torch.cat((self._ids[:, :keep], self._ids[:, keep + self._dropped : end]), dim=1)

    @property
    def count(self) -> int:
        """Number of positions at the end of `next_ids` whose logits `take` needs."""
        return len(self._drafts) + 1

    def take(self, logits: Tensor, reused: int | None) -> Iterator[Step]:
        """Choose tokens from the logits of a pass over `next_ids`, (count, vocab). reused: as in `Step`.

        Raises ModelError for logits that are not finite.
        """
        drafts, start = self._drafts, len(self.tokens)
        for draft, row in zip([*drafts, None], logits, strict=True):
            length = len(self.tokens)
            token, logprob, top = self._choose(row)
            self._write([token])
            self.tokens.append(token)
            finish = self._finish_reason(token)
            self.finished = finish is not None
            seen = length - self._dropped
            if length == start:
                yield Step(token, seen, reused, finish, logprob, top, drafted=len(drafts), dropped=self._dropped)
            else:
                yield Step(token, seen, seen, finish, logprob, top, guessed=True, dropped=self._dropped)
            if finish:
                return
            if token != draft:
                break
        if drafts and self._drafter:
            self._drafter.learn(len(drafts), len(self.tokens) - start - 1)

    def _choose(self, logits: Tensor) -> tuple[int, float | None, tuple[tuple[int, float], ...]]:
        """Choose a token from logits, (vocab,); return it with `logprob` and `top_logprobs` of `Step`."""
        with one_thread():
            logits = _on_cpu(logits)
            if not math.isfinite(logits.numpy().max()):  # three times as fast as torch's
                raise ModelError(f"the model's logits after {len(self.tokens)} positions are not finite numbers")
            token = self._sampler(logits, self.tokens, self._prompt_length)
            if self._top_logprobs is None:
                return token, None, ()
            logprobs = logits.log_softmax(-1)
            best = logprobs.topk(min(self._top_logprobs, len(logprobs)))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            return token, float(logprobs[token]), top

    def _finish_reason(self, token: int) -> FinishReason | None:
        if token in self._limits.eos_ids:
            return "eos"
        if len(self.tokens) == self._end:
            return "length"
        return "context" if len(self.tokens) == self._limits.end_of_context else None

    def _write(self, tokens: Sequence[int]) -> None:
        """Write tokens after the current ones in `_ids`, growing it if needed."""
        length = len(self.tokens)
        end = length + len(tokens)
        if end > self._ids.shape[1]:
            self._ids = torch.cat((self._ids, self._ids.new_empty(1, end)), dim=1)
        if tokens:
            self._ids[0, length:end] = torch.tensor(tokens)


def _on_cpu(logits: Tensor) -> Tensor:
    """Return fp32 logits on the CPU. From a GPU they are copied to page-locked memory, which is ten times as fast."""
    if logits.device.type != "cuda":
        return logits.to("cpu", torch.float32)
    copied = torch.empty(logits.shape, pin_memory=True)
    copied.copy_(logits, non_blocking=True)
    torch.cuda.current_stream(logits.device).synchronize()
    return copied
