"""Chat templates: Jinja programs that come with a checkpoint and are run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn, TypedDict

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvgen.errors import CheckpointError, UsageError


class Message(TypedDict):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class _RefusedError(Exception):
    """What a template raises by `raise_exception`."""


class ChatTemplate:
    """A template and the special tokens that it may name (`bos_token`, `eos_token`, ...).

    The environment is the one that templates are written for: transformers' `apply_chat_template`. A template is
    compiled when it is first used, so that a bad one does not keep its checkpoint from completing plain text.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, with the opening of the assistant's answer at the end.

        Raises UsageError if the template refuses the messages, CheckpointError if it is not valid or fails.
        """
        values: dict[str, Any] = {
            **self.special_tokens,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._template.render(values)
        except _RefusedError as error:
            raise UsageError(f"the chat template refuses this conversation: {error}") from None
        except _FAILURES as error:
            raise CheckpointError(f"the chat template fails ({type(error).__name__}: {str(error)[:200]})") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        return environment.from_string(self.source)


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
