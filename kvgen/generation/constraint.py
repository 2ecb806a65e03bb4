"""Constrained decoding: llguidance computes which tokens may come next, and the sampler chooses among them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from kvgen.errors import UsageError, in_one_line
from kvgen.generation.sampling import Sampler
from kvgen.generation.settings import Constraint
from kvgen.tokenizer import Tokenizer

_WHITESPACE = r"[ \n\t]{0,16}"  # between JSON tokens; bounded, or a model could generate blanks for ever


def constrained(sampler: Sampler, constraint: Constraint, tokenizer: Tokenizer, vocab_size: int | None) -> Sampler:
    """Restrict a sampler to the tokens that the constraint allows next; for one completion.

    End tokens are allowed only where the text may end. Raises UsageError for an invalid constraint or a tokenizer
    without end tokens.
    """
    matcher = _matcher(constraint, tokenizer, vocab_size).deep_copy()
    assert vocab_size is not None
    words = torch.zeros((vocab_size + 31) // 32, dtype=torch.int32)
    bits = torch.arange(32, dtype=torch.int32)

    def sample(logits: Tensor, ids: Sequence[int], prompt_length: int) -> int:
        matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.nbytes)
        if matcher.is_error():
            raise UsageError(f"{constraint.kind} cannot be followed: {_reason(matcher.get_error())}")
        allowed = (words[:, None] >> bits & 1).flatten()[: len(logits)].bool()
        token = sampler(logits.masked_fill(~allowed, -torch.inf), ids, prompt_length)
        matcher.consume_token(token)
        return token

    return sample


def check_constraint(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int | None) -> None:
    """Raise UsageError as `constrained` does, which then takes no time, where a large constraint may take seconds."""
    _matcher(constraint, tokenizer, vocab_size)


@lru_cache(maxsize=8)
def _matcher(constraint: Constraint, tokenizer: Tokenizer, vocab_size: int | None) -> LLMatcher:
    """Return a matcher to copy; copies share what it finds out about the constraint."""
    if vocab_size is None:
        raise UsageError("a constraint needs a model with a known vocabulary size")
    llguidance_tokenizer = _make_llguidance_tokenizer(tokenizer, vocab_size)
    try:
        matcher = LLMatcher(llguidance_tokenizer, _compile(constraint), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # takes longest for the first token, and fails if there is no text at all
    except ValueError as error:
        raise UsageError(f"{constraint.kind} cannot be used: {in_one_line(error)}") from None
    if matcher.is_error():
        raise UsageError(f"{constraint.kind} cannot be used: {_reason(matcher.get_error())}")
    return matcher


def _compile(constraint: Constraint) -> str:
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "grammar":
        return LLMatcher.grammar_from_lark(constraint.text)
    return LLMatcher.grammar_from_json_schema(constraint.text, {"whitespace_pattern": _WHITESPACE})


@lru_cache(maxsize=2)  # building one takes a tenth of a second or more
def _make_llguidance_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    if not tokenizer.eos_ids:
        raise UsageError("a constraint needs a tokenizer with an end token")
    try:
        return LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_ids))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"constraints do not work with this tokenizer ({in_one_line(error)})") from None


def _reason(text: str) -> str:
    """Return what llguidance says in one line: its first, and that of the error in a regular expression."""
    first, *others = text.strip().split("\n")
    if first == "NoExtensionBias":
        return "no text follows it"
    return " ".join([first, *(line.removeprefix("error: ") for line in others if line.startswith("error: "))])
