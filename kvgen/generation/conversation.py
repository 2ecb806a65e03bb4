"""A conversation with a model: each turn renders all of it anew, and the cache finds what it has already seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvgen.errors import KvgenError, NotFoundError, UsageError
from kvgen.generation.batch import Batch
from kvgen.generation.settings import Request
from kvgen.generation.text import Chunk
from kvgen.loading.load import Loaded
from kvgen.tokenizer.chat import Message, check_messages


@dataclass
class Conversation:
    """Messages, and the cache of what has been computed of them.

    request: how answers are to be completed; its prompt does not matter.
    prompt_tokens: of the conversation up to the last question.
    """

    loaded: Loaded
    request: Request
    messages: list[Message] = field(default_factory=list)
    cache: Any = None
    prompt_tokens: int = 0

    def ask(self, text: str) -> Iterator[Chunk]:
        """Say something; the chunks of the answer. What has come of it is kept when the caller stops or is interrupted.

        Raises UsageError for a conversation that the template refuses, ContextError for one that fills the context. It
        is then as before.
        """
        before, batch = len(self.messages), Batch(self.loaded, batch_size=1, cache=self.cache)
        self.messages.append({"role": "user", "content": text})
        answer: Message = {"role": "assistant", "content": ""}
        try:
            prompt = self.loaded.tokenizer.encode_chat(self.messages)
            self.prompt_tokens = len(prompt)
            request = replace(self.request, prompt=prompt)
            with closing(batch.complete(request)) as chunks:
                for chunk in chunks:
                    answer["content"] += chunk.text
                    yield chunk
        finally:
            self.cache = batch.cache
            if answer["content"]:
                self.messages.append(answer)
            else:
                del self.messages[before:]

    def undo(self) -> str | None:
        """Take back the last question and its answer; returns the question, None if there is none."""
        last = max((n for n, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            return None
        question = self.messages[last]["content"]
        del self.messages[last:]
        return question

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages if self.system is None else self.messages[1:]
        self.messages = [*([] if not text else [Message(role="system", content=text)]), *rest]

    def save(self, path: Path) -> None:
        """Write the messages as JSON. Raises KvgenError if that cannot be."""
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        try:
            path.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:
            raise KvgenError(f"{path}: cannot be written ({error.strerror})") from error

    def load(self, path: Path) -> None:
        """Take the messages of a file instead. Raises NotFoundError, or UsageError for one that has none."""
        try:
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise NotFoundError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not a conversation ({error})") from None
        try:
            self.messages = check_messages(value.get("messages") if isinstance(value, dict) else value)
        except UsageError as error:
            raise UsageError(f"{path}: not a conversation ({error})") from None
