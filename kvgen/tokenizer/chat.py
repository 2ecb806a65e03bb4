"""Chat templates: Jinja programs that come with a checkpoint and are run in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from kvgen.errors import CheckpointError, UsageError
from kvgen.tokenizer.sandbox import Program, RefusedError


class Message(TypedDict):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


def check_messages(value: Any) -> list[Message]:
    """What came from JSON, as messages. Raises UsageError if it is none."""
    if not isinstance(value, list) or not value:
        raise UsageError("`messages` must be a list of messages")
    for message in value:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise UsageError("each message must be an object with `role` and `content`")
        if not all(isinstance(part, str) for part in message.values()):
            raise UsageError("`role` and `content` of a message must be strings")
    messages: list[Message] = value
    return messages


class ChatTemplate:
    """A template and the special tokens that it may name (`bos_token`, `eos_token`, ...).

    The environment is the one that templates are written for: transformers' `apply_chat_template`. A template is
    compiled when it is first used, so that a bad one does not keep its checkpoint from completing plain text.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._program = Program(source)

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
            return self._program.render(values)
        except RefusedError as error:
            raise UsageError(f"the chat template refuses this conversation: {str(error)[:200]}") from None
        except Exception as error:  # a template can make Python raise anything
            raise CheckpointError(f"the chat template fails ({type(error).__name__}: {str(error)[:200]})") from error

    def render_with_system(self, messages: Sequence[Message]) -> str:
        """As `render`, but a system message that the template refuses or leaves out goes before the first user's.

        Raises UsageError too where there is no user's message to put it into.
        """
        if not messages or messages[0]["role"] != "system":
            return self.render(messages)
        system, rest = messages[0]["content"], list(messages[1:])
        refusal: UsageError | None = None
        try:
            text = self.render(messages)
            another: Message = {"role": "system", "content": f"{system}."}
            if text != self.render([another, *rest]):  # a template may trim or quote it, so its text is not looked for
                return text
        except UsageError as error:
            refusal = error
        first = next((index for index, message in enumerate(rest) if message["role"] == "user"), None)
        if first is None:
            raise refusal or UsageError("the chat template has no place for a system message, and there is no other")
        rest[first] = {"role": "user", "content": f"{system}\n\n{rest[first]['content']}"}
        return self.render(rest)
