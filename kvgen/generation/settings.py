"""What a caller can set about generation. Free of torch, so that the command line can show it at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvgen.errors import UsageError

DEFAULT_MAX_TOKENS = 256
DEFAULT_MAX_ROWS = 64  # that are decoded side by side; more gain little on a CPU
DEFAULT_KEEP_FIRST = 4  # attention sinks (Xiao et al. 2023, arXiv:2309.17453)
_LARGEST = 1e6  # of a bias or a penalty: far beyond any logit, far below where float32 ends


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

    Raises UsageError for a value out of its range.
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
        self._check(0 <= self.temperature < math.inf, "temperature", "0 or more")
        self._check(self.top_k >= 0, "top_k", "0 or more")
        self._check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self._check(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        self._check(0 < self.typical_p <= 1, "typical_p", "above 0 and at most 1")
        penalty_fits = 1 / _LARGEST <= self.repetition_penalty <= _LARGEST
        self._check(penalty_fits, "repetition_penalty", f"from {1 / _LARGEST:g} to {_LARGEST:g}")
        self._check(abs(self.presence_penalty) <= _LARGEST, "presence_penalty", f"at most {_LARGEST:g} in size")
        self._check(abs(self.frequency_penalty) <= _LARGEST, "frequency_penalty", f"at most {_LARGEST:g} in size")
        bias_fits = all(0 <= id_ < 2**31 and abs(value) <= _LARGEST for id_, value in self.logit_bias.items())
        self._check(bias_fits, "logit_bias", f"token ids with numbers of at most {_LARGEST:g} in size")
        self._check(self.seed is None or 0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1")

    def _check(self, valid: bool, name: str, wanted: str) -> None:
        if not valid:
            raise UsageError(f"{name} is {getattr(self, name)!s:.80}; it must be {wanted}")


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
    max_tokens: the most tokens to generate.
    stop: texts that end the completion; they are not part of it.
    top_logprobs: how many of the most likely tokens to report with each step, besides the chosen one; None for no
        log-probabilities.
    max_context: the most positions to hand to the model, which bounds cache and time: a longer sequence loses its
        middle, see `Limits`. LOSSY. keep_first: how many tokens at the start stay.
    constraint: what the completion has to be; None for any text. It is that unless it ends early, which its
        finish_reason says: `length`, `stop` or `context`.

    Raises UsageError for max_tokens below 1.
    """

    prompt: Sequence[int]
    sampling: Sampling = DEFAULT_SAMPLING
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    max_context: int | None = None
    keep_first: int = DEFAULT_KEEP_FIRST
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; it must be at least 1")

    def most_positions(self, context_length: int | None) -> int:
        """How many positions its cache may come to hold, with a model of this context."""
        positions = len(self.prompt) + self.max_tokens
        return min(positions, self.max_context or context_length or positions)
