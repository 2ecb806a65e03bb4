"""Chat messages and chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from kvgen.errors import UsageError
from kvgen.tokenizer.sandbox import Sandbox


class Message(TypedDict):
    """One turn: `role` is system, user or assistant.

    >>> message: kvgen.Message = {"role": "user", "content": "What is the capital of Japan?"}
    >>> "".join(chunk.text for chunk in kvgen.chat(loaded, [message], kvgen.Sampling(temperature=0)))
    'The capital of Japan is Tokyo.'
    """

    role: str
    content: str


def check_messages(value: Any) -> list[Message]:
    """Return decoded JSON as messages. Raises UsageError if it is not a list of messages."""
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
    """A Jinja chat template and the special tokens it may use (`bos_token`, `eos_token`, ...).

    It sees the variables and functions of transformers' `apply_chat_template`. It is compiled at the first rendering,
    so a checkpoint with a bad template still completes plain text.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._sandbox = Sandbox(source)

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """Render a conversation, followed by the start of the assistant's answer. tools: in JSON types.

        Raises UsageError if the template refuses the messages, CheckpointError if it is invalid or fails.
        """
        return self._sandbox.render(
            {
                **self.special_tokens,
                "messages": list(messages),
                "tools": tools,
                "documents": None,
                "add_generation_prompt": True,
            }
        )

    def render_with_system(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """Render; if the template refuses or ignores the system message, prepend it to the first user message.

        Raises UsageError if there is no user message either.
        """
        if not messages or messages[0]["role"] != "system":
            return self.render(messages, tools)
        system, rest = messages[0]["content"], list(messages[1:])
        refusal: UsageError | None = None
        try:
            text = self.render(messages, tools)
            changed: Message = {"role": "system", "content": f"{system}."}
            if text != self.render([changed, *rest], tools):  # do not search the text: a template may trim or quote it
                return text
        except UsageError as error:
            refusal = error
        first = next((index for index, message in enumerate(rest) if message["role"] == "user"), None)
        if first is None:
            raise refusal or UsageError("the chat template ignores system messages, and there is no user message")
        rest[first] = {"role": "user", "content": f"{system}\n\n{rest[first]['content']}"}
        return self.render(rest, tools)
