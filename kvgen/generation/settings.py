"""Generation settings: sampling, constraints and requests. Does not import torch, so the command line starts fast."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard

from kvgen.errors import UsageError

DEFAULT_MAX_TOKENS = 256
DEFAULT_BATCH_SIZE = 64  # larger batches gain little on a CPU
DEFAULT_KEEP_FIRST = 4  # attention sinks (Xiao et al. 2023, arXiv:2309.17453)
_UNLIMITED = 2**40  # tokens
_LARGEST = 1e6  # bias or penalty: far beyond any logit, far below the float32 maximum


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether `value` is an int or a NumPy integer, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def are_ids(value: Any) -> TypeGuard[Sequence[int]]:
    """Whether `value` is an iterable of integers, but not text or bytes."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return False
    return all(type(id_) is int or is_whole(id_) for id_ in value)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(settings: Any, name: str, valid: bool, expected: str) -> None:
    if not valid:
        raise UsageError(f"{name} is {getattr(settings, name)!r:.80}; it must be {expected}", name)


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

        >>> sampling = kvgen.Sampling(temperature=0.8, top_p=0.9, seed=1)
        >>> kvgen.generate(loaded, "Once upon a time,", sampling, max_tokens=8)
        ' a large part of the world was dedicated'

    temperature: divides the logits; 0 is greedy, and then top_k, top_p, min_p and typical_p have no effect.
    top_k: keep the k most likely tokens; 0 for all.
    top_p: keep the most likely tokens with this total probability (Holtzman et al. 2019, arXiv:1904.09751); 1 for all.
    min_p: keep tokens at least this fraction as likely as the most likely one (arXiv:2407.01082); 0 for all.
    typical_p: keep the tokens whose surprise is closest to the expected one, with this total probability
        (Meister et al. 2022, arXiv:2202.00666); 1 for all.
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt and the completion
        (Keskar et al. 2019, arXiv:1909.05858); 1 for none.
    presence_penalty: subtracted from the logits of tokens already generated (OpenAI's definition).
    frequency_penalty: subtracted once for each time that the token was generated.
    logit_bias: added to the logits of these token ids.
    seed: of the random generator; None for a random one. The same seed on the same machine gives the same text.

    Raises UsageError for values of the wrong type or out of range.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in ("temperature", "top_p", "min_p", "typical_p", *penalties):
            _check(self, name, _is_number(getattr(self, name)), "a number")
        _check(self, "temperature", 0 <= self.temperature <= sys.float_info.max, "a finite number, 0 or more")
        _check(self, "top_k", is_whole(self.top_k) and self.top_k >= 0, "a whole number, 0 or more")
        _check(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        _check(self, "min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        _check(self, "typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1")
        valid = 1 / _LARGEST <= self.repetition_penalty <= _LARGEST
        _check(self, "repetition_penalty", valid, f"from {1 / _LARGEST:g} to {_LARGEST:g}")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(self, name, abs(getattr(self, name)) <= _LARGEST, f"at most {_LARGEST:g} in size")
        valid = isinstance(self.logit_bias, Mapping) and all(
            is_whole(id_) and 0 <= id_ < 2**31 and _is_number(bias) and abs(bias) <= _LARGEST
            for id_, bias in self.logit_bias.items()
        )
        _check(self, "logit_bias", valid, f"token ids with numbers of at most {_LARGEST:g} in size")
        valid = self.seed is None or (is_whole(self.seed) and 0 <= self.seed < 2**63)
        _check(self, "seed", valid, "a whole number from 0 to 2^63 - 1, or None")


DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True)
class Constraint:
    """A format that the completion must follow.

        >>> name = kvgen.Constraint("regex", r" [A-Z][a-z]+\.")
        >>> kvgen.generate(loaded, "The capital of France is", kvgen.Sampling(temperature=0), constraint=name)
        ' Paris.'

    kind: `json-schema` for a JSON Schema, `regex` for a regular expression, `grammar` for llguidance's dialect of Lark.
    text: the schema, expression or grammar.

    Raises UsageError for text that is not valid Unicode.
    """

    kind: Literal["json-schema", "regex", "grammar"]
    text: str

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the {self.kind} is not valid Unicode at character {error.start}") from None


@dataclass(frozen=True)
class Request:
    """One completion to compute.

        >>> request = kvgen.Request(loaded.tokenizer.encode("1, 2, 3,"), kvgen.Sampling(temperature=0), max_tokens=6)
        >>> "".join(chunk.text for chunk in kvgen.Batch(loaded).complete(request))
        ' 4, 5,'

    prompt: token ids, from `Tokenizer.encode` or `encode_chat`.
    max_tokens: maximum number of tokens to generate; None for as many as the model's context has room for.
    stop: one or more strings that end the completion; they are not part of it.
    top_logprobs: how many of the most likely tokens to report with each step, besides the chosen one; None for no
        log-probabilities.
    max_context: maximum number of positions that the model sees; longer sequences lose their middle, see
        `kvgen.generation.completion.Limits`. LOSSY. keep_first: how many tokens to keep at the start.
    use_cache: False recomputes every position on each step, and leaves no cache.
    constraint: format of the completion; None for any text. A completion that ends early, with the finish_reason
        `length`, `stop` or `context`, may not follow it.

    Raises UsageError for values of the wrong type or out of range.
    """

    prompt: Sequence[int]
    sampling: Sampling = DEFAULT_SAMPLING
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    stop: str | Sequence[str] = ()
    top_logprobs: int | None = None
    max_context: int | None = None
    keep_first: int = DEFAULT_KEEP_FIRST
    constraint: Constraint | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _check(self, "prompt", are_ids(self.prompt), "token ids")
        _check(self, "sampling", isinstance(self.sampling, Sampling), "a Sampling")
        valid = isinstance(self.stop, Iterable) and all(isinstance(text, str) for text in self.stop)
        _check(self, "stop", valid, "a string, or several")
        _check(self, "use_cache", isinstance(self.use_cache, bool), "True or False")
        _check(self, "constraint", isinstance(self.constraint, Constraint | None), "a Constraint or None")
        for name, least in (("max_tokens", 1), ("top_logprobs", 0), ("max_context", 2)):
            value = getattr(self, name)
            valid = value is None or (is_whole(value) and value >= least)
            _check(self, name, valid, f"a whole number, at least {least}, or None")
        _check(self, "keep_first", is_whole(self.keep_first) and self.keep_first >= 0, "a whole number, 0 or more")

    @property
    def most_tokens(self) -> int:
        """`max_tokens` as a number."""
        return _UNLIMITED if self.max_tokens is None else self.max_tokens

    def most_positions(self, context_length: int | None) -> int:
        """Maximum number of positions that the cache may come to hold, for a model with this context length."""
        positions = len(self.prompt) + self.most_tokens
        return min(positions, self.max_context or context_length or positions)
