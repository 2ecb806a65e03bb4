"""Groups of options: dataclasses whose fields are options, and a decorator that expands them in a command."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from kvgen.cli import options
from kvgen.cli.interrupts import raise_interrupts
from kvgen.cli.prompts import read_option_file
from kvgen.cli.render import download_progress, notes
from kvgen.errors import UsageError
from kvgen.generation.settings import DEFAULT_KEEP_FIRST, DEFAULT_MAX_TOKENS, Constraint, Request, Sampling

if TYPE_CHECKING:
    from kvgen import Loaded
    from kvgen.client.remote import Remote
    from kvgen.tokenizer.prompt import PromptFormat

L = TypeVar("L", "Loaded", "Remote")


def takes_groups(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command so that each parameter that is a dataclass becomes options, one per field.

    defaults: the command's own defaults for some of these options.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[Parameter] = []
        groups: dict[str, type] = {}
        hints = get_type_hints(command, include_extras=True)
        for name, parameter in signature(command).parameters.items():
            group = hints[name]
            if not (isinstance(group, type) and is_dataclass(group)):
                parameters.append(parameter.replace(annotation=group))
                continue
            groups[name] = group
            annotations = get_type_hints(group, include_extras=True)
            for field in fields(group):
                default, annotation = defaults.get(field.name, field.default), annotations[field.name]
                parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))

        @wraps(command)
        def run(**arguments: Any) -> None:
            for name, group in groups.items():
                arguments[name] = group(**{field.name: arguments.pop(field.name) for field in fields(group)})
            command(**arguments)

        run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


@dataclass(frozen=True)
class ModelOptions:
    """Options of commands that load a model."""

    model: options.Model = None
    tokenizer: options.TokenizerFile = None
    ids: options.Ids = False
    adapter: options.Adapter = None
    dtype: options.Dtype = "auto"
    device: options.Device = "auto"
    kernels: options.Kernels = "auto"
    quantize: options.Quantize = "auto"
    kv_dtype: options.KVDtype = "auto"
    activations: options.Activations = "int16"
    threads: options.Threads = None

    def load(self, *, quiet: bool) -> Loaded:
        """Call `kvgen.load`, with a progress bar for downloads."""
        from kvgen import load
        from kvgen.kernels.build import must_compile

        self.prepare()
        if sys.stderr.isatty() and self.kernels != "off" and must_compile():
            notes(quiet=quiet)("compiling the kernels for this processor, once")
        with download_progress(quiet=quiet) as progress:
            loaded = load(**self.arguments(), progress=progress)
        if loaded.note:
            notes(quiet=quiet)(f"note: {loaded.note}")
        return loaded

    def prepare(self) -> None:
        """Prepare the process for a model: Ctrl-C raises, torch has the chosen threads."""
        import torch

        raise_interrupts()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for `kvgen.load`."""
        names = ("adapter", "dtype", "device", "kernels", "quantize", "kv_dtype", "activations")
        tokenizer = "ids" if self.ids else self.tokenizer
        return {"reference": self.model, "tokenizer": tokenizer, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class EngineChoice:
    """Options of `kvgen compare` for models that run in other libraries."""

    backend: options.Backend = "native"
    cache: options.EngineCache = "auto"
    attention: options.EngineAttention = "auto"
    reference: options.Reference = None

    def load_reference(self, source: ModelOptions, *, quiet: bool) -> Loaded | None:
        """Load the model in the library to compare with, with its own choice of everything; None without one."""
        if self.reference is None:
            return None
        plain = ModelOptions(source.model, source.tokenizer, source.ids, source.adapter)
        return EngineChoice(self.reference).load(plain, quiet=quiet)

    def load(self, source: ModelOptions, *, quiet: bool) -> Loaded:
        """Load the model in the chosen library. Raises UsageError for options that it does not have."""
        if source.adapter and self.reference not in (None, "native"):
            raise UsageError(f"--adapter belongs to kvgen's own decoder, not to --reference {self.reference}")
        if self.backend == "native":
            for name in ("cache", "attention"):
                if getattr(self, name) != "auto":
                    raise UsageError(f"--{name} belongs to other backends: give --backend {' or '.join(_ENGINES)}")
            return source.load(quiet=quiet)
        from kvgen.comparison.engines import EngineOptions, load_engine

        for name in ("adapter", "kernels", "quantize", "activations"):
            if getattr(source, name) != getattr(ModelOptions, name):
                raise UsageError(f"--{name} belongs to kvgen's own decoder, not to --backend {self.backend}")
        source.prepare()
        arguments = source.arguments()
        shared = {name: arguments[name] for name in ("dtype", "kv_dtype", "device", "tokenizer")}
        chosen = EngineOptions(cache=self.cache, attention=self.attention, **shared)
        with download_progress(quiet=quiet) as progress:
            return load_engine(self.backend, source.model, chosen, progress)


_ENGINES = ("transformers", "llama.cpp")


@dataclass(frozen=True)
class CompletionOptions:
    """Options of commands that generate text."""

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
        """Return a request with an empty prompt. Raises UsageError for a value out of range."""
        if self.max_tokens == 0:
            raise UsageError(f"--max-tokens is 0; give at least 1, or {options.NO_LIMIT} for no limit")
        sampling = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        sampling["logit_bias"] = _parse_logit_bias(self.logit_bias or [])
        if self.seed is None:
            sampling["seed"] = random.SystemRandom().randrange(2**31)
        return Request(
            (),
            Sampling(**sampling),
            None if self.max_tokens == options.NO_LIMIT else self.max_tokens,
            tuple(self.stop or ()),
            top_logprobs,
            self.max_context,
            self.keep_first,
            self._constraint(),
        )

    def _constraint(self) -> Constraint | None:
        if sum(value is not None for value in (self.json_schema, self.regex, self.grammar)) > 1:
            raise UsageError("give one of --json-schema, --regex and --grammar")
        if self.json_schema is not None:
            return Constraint("json-schema", read_option_file("--json-schema", self.json_schema))
        if self.grammar is not None:
            return Constraint("grammar", read_option_file("--grammar", self.grammar))
        return None if self.regex is None else Constraint("regex", self.regex)


def _parse_logit_bias(entries: list[str]) -> dict[int, float]:
    bias = {}
    for entry in entries:
        id_, _, value = entry.partition("=")
        try:
            bias[int(id_)] = float(value)
        except ValueError:
            raise UsageError(f"--logit-bias {entry!r}: give a token id and a number, as in 50256=-100") from None
    return bias


@dataclass(frozen=True)
class PromptOptions:
    """Options that decide how a prompt becomes token ids."""

    chat: options.Chat = False
    system: options.System = None
    chat_template: options.ChatTemplateFile = None
    parse_special: options.ParseSpecial = False

    def check(self, *, conversations: bool = False) -> None:
        """Raise UsageError for options that need --chat, and read the template.

        conversations: whether prompts may be conversations without --chat.
        """
        for name, value in (("--system", self.system), ("--chat-template", self.chat_template)):
            if value is not None and not self.chat and not conversations:
                raise UsageError(f"{name} goes with --chat")
        _ = self.template

    @cached_property
    def template(self) -> str | None:
        """The text of --chat-template."""
        return None if self.chat_template is None else read_option_file("--chat-template", self.chat_template)

    def prepared(self, loaded: L) -> L:
        """Replace the checkpoint's chat template with that of --chat-template, if given."""
        if self.template is None:
            return loaded
        return replace(loaded, tokenizer=loaded.tokenizer.with_chat_template(self.template))

    @property
    def format(self) -> PromptFormat:
        from kvgen.tokenizer.prompt import PromptFormat

        return PromptFormat(self.chat, self.system, self.parse_special)
