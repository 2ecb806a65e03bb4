"""Chat templates: Jinja programs that come with a checkpoint and are run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypedDict

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvgen.errors import CheckpointError, UsageError


class Message(TypedDict):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


class _RefusedError(Exception):
    """What a template raises by `raise_exception`."""


class ChatTemplate:
    """A template and the special tokens that it may name (`bos_token`, `eos_token`, ...).

    The environment is the one that templates are written for: transformers' `apply_chat_template`.
    Raises CheckpointError if the template is not valid.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja ({error})") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, with the opening of the assistant's answer at the end.

        Raises UsageError if the template refuses the messages, CheckpointError if it fails.
        """
        values: dict[str, Any] = {
            **self.special_tokens,
            "messages": list(messages),
            "add_generation_prompt": True,
        }
        try:
            return self._template.render(values)
        except _RefusedError as error:
            raise UsageError(f"the chat template refuses this conversation: {error}") from None
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise CheckpointError(f"the chat template fails ({error})") from error


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
