"""Encode a prompt: plain text, or a conversation in the checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvgen.tokenizer.chat import Message


class Encoder(Protocol):
    """Turns prompts into ids: a `Tokenizer`, here or on a server."""

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Message], *, parse_special: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class PromptFormat:
    """How to encode prompts.

    chat: put text into the chat template as a user message.
    system: system message for conversations without one.
    parse_special: see `Tokenizer.encode`.
    """

    chat: bool = False
    system: str | None = None
    parse_special: bool = False

    def encode(self, tokenizer: Encoder, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a text or conversation. Raises UsageError as `Tokenizer` does."""
        if isinstance(prompt, str):
            if not self.chat:
                return tokenizer.encode(prompt, parse_special=self.parse_special)
            prompt = [{"role": "user", "content": prompt}]
        messages = list(prompt)
        if self.system is not None and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self.system})
        return tokenizer.encode_chat(messages, parse_special=self.parse_special)
