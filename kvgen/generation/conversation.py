"""Multi-turn chat: each turn renders the whole conversation, and the cache reuses what it has already computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgen.errors import KvgenError, NotFoundError, UsageError
from kvgen.generation.settings import Request
from kvgen.generation.text import Chunk
from kvgen.tokenizer.chat import Message, check_messages

if TYPE_CHECKING:
    from kvgen.generation.batch import Batch
    from kvgen.loading.load import Loaded


@dataclass
class Conversation:
    """Messages and the cache of what has been computed of them.

        >>> talk = kvgen.Conversation(loaded, kvgen.Request((), kvgen.Sampling(temperature=0)))
        >>> talk.system = "You are brief."
        >>> for question in ("What is the capital of Japan?", "And of Italy?"):
        ...     print("".join(chunk.text for chunk in talk.ask(question)))
        The capital of Japan is Tokyo.
        The capital of Italy is Rome.

    request: settings for each answer; its prompt is ignored.
    cache: see `load_prompt_cache` and `save_prompt_cache` to keep it in a file.
    """

    loaded: Loaded
    request: Request = field(default_factory=lambda: Request(()))
    messages: list[Message] = field(default_factory=list)
    cache: Any = None

    def ask(self, text: str) -> Iterator[Chunk]:
        """Add a question; yield the chunks of the answer. An interrupted answer is kept as far as it came.

        Raises UsageError if the template refuses the conversation, ContextError if it fills the context; the messages
        are then unchanged.
        """
        before, batch = len(self.messages), self._batch()
        self.messages.append({"role": "user", "content": text})
        answer: Message = {"role": "assistant", "content": ""}
        try:
            prompt = self.loaded.tokenizer.encode_chat(self.messages)
            with closing(batch.complete(replace(self.request, prompt=prompt))) as chunks:
                for chunk in chunks:
                    answer["content"] += chunk.text
                    yield chunk
        finally:
            self.cache = batch.cache
            if answer["content"]:
                self.messages.append(answer)
            else:
                del self.messages[before:]

    def _batch(self) -> Batch:
        from kvgen.generation.batch import Batch  # imports torch, which a conversation on a server does without

        return Batch(self.loaded, batch_size=1, kept=[self.cache])

    def undo(self) -> str | None:
        """Remove the last question and its answer; return the question, or None if there is none."""
        last = max((n for n, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            return None
        question = self.messages[last]["content"]
        del self.messages[last:]
        return question

    def reset(self) -> None:
        """Remove all messages but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    @property
    def system(self) -> str | None:
        """The system message; None removes it."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages if self.system is None else self.messages[1:]
        self.messages = [*([] if not text else [Message(role="system", content=text)]), *rest]

    def save(self, path: Path) -> None:
        """Write the messages as JSON. Raises KvgenError if the file cannot be written."""
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        try:
            path.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:
            raise KvgenError(f"{path}: cannot be written ({error.strerror})") from error

    def load(self, path: Path) -> None:
        """Replace the messages by those of a file. Raises NotFoundError, or UsageError for an invalid file."""
        try:
            value = json.loads(path.read_bytes())
            self.messages = check_messages(value.get("messages") if isinstance(value, dict) else value)
        except OSError as error:
            raise NotFoundError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError, UsageError) as error:
            raise UsageError(f"{path}: not a conversation ({error})") from None
