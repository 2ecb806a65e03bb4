"""The options that say what a completion is to be, and how a prompt becomes token ids."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from kvgen.cli import options
from kvgen.cli.prompts import read_option_file
from kvgen.errors import UsageError
from kvgen.generation.settings import DEFAULT_KEEP_FIRST, DEFAULT_MAX_TOKENS, Constraint, Request, Sampling

if TYPE_CHECKING:
    from kvgen import Loaded
    from kvgen.tokenizer.prompt import PromptFormat


@dataclass(frozen=True)
class CompletionOptions:
    """What every command that completes lets be chosen. Each field is an option; see `kvgen.cli.groups`."""

    max_tokens: options.MaxTokens = DEFAULT_MAX_TOKENS
    stop: options.Stop = None
    max_context: options.MaxContext = None
    keep_first: options.KeepFirst = DEFAULT_KEEP_FIRST
    temperature: options.Temperature = Sampling.temperature
    top_k: options.TopK = Sampling.top_k
    top_p: options.TopP = Sampling.top_p
    min_p: options.MinP = Sampling.min_p
    typical_p: options.TypicalP = Sampling.typical_p
    repetition_penalty: options.RepetitionPenalty = Sampling.repetition_penalty
    presence_penalty: options.PresencePenalty = Sampling.presence_penalty
    frequency_penalty: options.FrequencyPenalty = Sampling.frequency_penalty
    logit_bias: options.LogitBias = None
    seed: options.Seed = None
    json_schema: options.JsonSchema = None
    regex: options.Regex = None
    grammar: options.Grammar = None

    def request(self, top_logprobs: int | None = None) -> Request:
        """A request without a prompt yet. Raises UsageError for a value out of its range."""
        sampling = Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=options.parse_logit_bias(self.logit_bias),
            seed=random.SystemRandom().randrange(2**31) if self.seed is None else self.seed,
        )
        return Request(
            (),
            sampling,
            self._most_tokens(),
            tuple(self.stop or ()),
            top_logprobs,
            self.max_context,
            self.keep_first,
            self._constraint(),
        )

    def _most_tokens(self) -> int | None:
        """None for as many as fit."""
        if self.max_tokens == 0:
            raise UsageError(f"--max-tokens is 0; it must be at least 1, or {options.NO_LIMIT} for no limit")
        return None if self.max_tokens == options.NO_LIMIT else self.max_tokens

    def _constraint(self) -> Constraint | None:
        if sum(value is not None for value in (self.json_schema, self.regex, self.grammar)) > 1:
            raise UsageError("give one of --json-schema, --regex and --grammar")
        if self.json_schema is not None:
            return Constraint("json-schema", read_option_file("--json-schema", self.json_schema))
        if self.grammar is not None:
            return Constraint("grammar", read_option_file("--grammar", self.grammar))
        return None if self.regex is None else Constraint("regex", self.regex)


@dataclass(frozen=True)
class PromptOptions:
    """How a prompt is to be read. Each field is an option."""

    chat: options.Chat = False
    system: options.System = None
    chat_template: options.ChatTemplateFile = None
    parse_special: options.ParseSpecial = False

    def check(self, *, conversations: bool = False) -> None:
        """Raises UsageError for options that do not go together or a template that cannot be read.

        conversations: whether prompts may be that without --chat.
        """
        for name, value in (("--system", self.system), ("--chat-template", self.chat_template)):
            if value is not None and not self.chat and not conversations:
                raise UsageError(f"{name} goes with --chat")
        _ = self.template

    @cached_property
    def template(self) -> str | None:
        """The template that was chosen instead of the checkpoint's."""
        return None if self.chat_template is None else read_option_file("--chat-template", self.chat_template)

    def prepared(self, loaded: Loaded) -> Loaded:
        """With the template that was chosen."""
        if self.template is None:
            return loaded
        return replace(loaded, tokenizer=loaded.tokenizer.with_chat_template(self.template))

    @property
    def format(self) -> PromptFormat:
        """How a prompt becomes token ids."""
        from kvgen.tokenizer.prompt import PromptFormat

        return PromptFormat(self.chat, self.system, self.parse_special)
