"""What a caller can set about generation. Free of torch, so that the command line can show it at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard

from kvgen.errors import UsageError

DEFAULT_MAX_TOKENS = 256
DEFAULT_BATCH_SIZE = 64  # that are decoded side by side; more gain little on a CPU
DEFAULT_KEEP_FIRST = 4  # attention sinks (Xiao et al. 2023, arXiv:2309.17453)
_UNLIMITED = 2**40  # tokens: centuries
_LARGEST = 1e6  # of a bias or a penalty: far beyond any logit, far below where float32 ends


_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number: an int, or one of numpy's; True and False are not meant as such."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number, whole or not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def are_ids(value: Any) -> TypeGuard[Sequence[int]]:
    """Whether they can be token ids; bytes are not."""
    return (
        not isinstance(value, str | bytes)
        and isinstance(value, Iterable)
        and all(type(id_) is int or is_whole(id_) for id_ in value)
    )


def _check(settings: Any, name: str, valid: bool, wanted: str) -> None:
    if not valid:
        raise UsageError(f"{name} is {getattr(settings, name)!r:.80}; it must be {wanted}")


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    temperature: divides the logits; 0 takes the most likely token, and then the filters below do not matter.
    top_k: only the k most likely tokens; 0 for all.
    top_p: only the most likely tokens that hold this much probability together (Holtzman et al. 2019,
        arXiv:1904.09751); 1 for all.
    min_p: only tokens at least this fraction as likely as the most likely one (arXiv:2407.01082); 0 for all.
    typical_p: only the tokens whose surprise is nearest to the expected one, with this much probability
        together (Meister et al. 2022, arXiv:2202.00666); 1 for all.
    repetition_penalty: divides positive logits, and multiplies negative ones, of the tokens in prompt and
        completion (Keskar et al. 2019, arXiv:1909.05858); 1 for none.
    presence_penalty: subtracted from the logit of each token that is in the completion (OpenAI's definition).
    frequency_penalty: subtracted as many times as the token occurs in the completion.
    logit_bias: added to the logits of these token ids.
    seed: of the random generator; None for a new one each time. The same seed on the same machine gives the same
        text.

    Raises UsageError for a value of a wrong type or out of its range.
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
        for name in ("temperature", "top_p", "min_p", "typical_p", *_PENALTIES):
            _check(self, name, is_number(getattr(self, name)), "a number")
        _check(self, "temperature", 0 <= self.temperature < math.inf, "0 or more")
        _check(self, "top_k", is_whole(self.top_k) and self.top_k >= 0, "a whole number, 0 or more")
        _check(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        _check(self, "min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        _check(self, "typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1")
        penalty_fits = 1 / _LARGEST <= self.repetition_penalty <= _LARGEST
        _check(self, "repetition_penalty", penalty_fits, f"from {1 / _LARGEST:g} to {_LARGEST:g}")
        _check(self, "presence_penalty", abs(self.presence_penalty) <= _LARGEST, f"at most {_LARGEST:g} in size")
        _check(self, "frequency_penalty", abs(self.frequency_penalty) <= _LARGEST, f"at most {_LARGEST:g} in size")
        _check(self, "logit_bias", self._bias_fits(), f"token ids with numbers of at most {_LARGEST:g} in size")
        seed_fits = self.seed is None or (is_whole(self.seed) and 0 <= self.seed < 2**63)
        _check(self, "seed", seed_fits, "a whole number from 0 to 2^63 - 1, or None")

    def _bias_fits(self) -> bool:
        return isinstance(self.logit_bias, Mapping) and all(
            is_whole(id_) and 0 <= id_ < 2**31 and is_number(value) and abs(value) <= _LARGEST
            for id_, value in self.logit_bias.items()
        )


DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True)
class Constraint:
    """What a completion has to be. kind: `json-schema`, a JSON Schema; `regex`, a regular expression; `grammar`, in the
    syntax of Lark that llguidance documents. text: the constraint itself.

    Raises UsageError for a text that is not valid Unicode.
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
    """What is asked of one completion.

    prompt: token ids, from `Tokenizer.encode` or `encode_chat`.
    max_tokens: the most tokens to generate; None for as many as the model's context has room for.
    stop: a text that ends the completion, or several; they are not part of it.
    top_logprobs: how many of the most likely tokens to report with each step, besides the chosen one; None for no
        log-probabilities.
    max_context: the most positions to hand to the model, which bounds cache and time: a longer sequence loses its
        middle, see `Limits`. LOSSY. keep_first: how many tokens at the start stay.
    constraint: what the completion has to be; None for any text. It is that unless it ends early, which its
        finish_reason says: `length`, `stop` or `context`.

    Raises UsageError for a value of a wrong type or out of its range.
    """

    prompt: Sequence[int]
    sampling: Sampling = DEFAULT_SAMPLING
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    stop: str | Sequence[str] = ()
    top_logprobs: int | None = None
    max_context: int | None = None
    keep_first: int = DEFAULT_KEEP_FIRST
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        _check(self, "prompt", are_ids(self.prompt), "token ids")
        _check(self, "sampling", isinstance(self.sampling, Sampling), "a Sampling")
        stops_fit = isinstance(self.stop, Iterable) and all(isinstance(text, str) for text in self.stop)
        _check(self, "stop", stops_fit, "a text, or several")
        _check(self, "constraint", isinstance(self.constraint, Constraint | None), "a Constraint or None")
        for name, least in (("max_tokens", 1), ("top_logprobs", 0), ("max_context", 2)):
            value = getattr(self, name)
            fits = value is None or (is_whole(value) and value >= least)
            _check(self, name, fits, f"a whole number, at least {least}, or None")
        _check(self, "keep_first", is_whole(self.keep_first) and self.keep_first >= 0, "a whole number, 0 or more")

    @property
    def most_tokens(self) -> int:
        """`max_tokens` as a number."""
        return _UNLIMITED if self.max_tokens is None else self.max_tokens

    def most_positions(self, context_length: int | None) -> int:
        """How many positions its cache may come to hold, with a model of this context."""
        positions = len(self.prompt) + self.most_tokens
        return min(positions, self.max_context or context_length or positions)
