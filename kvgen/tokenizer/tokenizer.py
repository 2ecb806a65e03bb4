"""The tokenizer that the rest of kvgen sees, whatever file it came from."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from kvgen.errors import UsageError
from kvgen.tokenizer.chat import ChatTemplate, Message
from kvgen.tokenizer.detokenizer import Detokenizer


class Tokenizer:
    """A vocabulary with its policies.

    backend: the tokenizer proper; its post-processor adds BOS and EOS where the checkpoint wants them.
    eos_ids: the ids that end a completion.
    chat_template: how the checkpoint wants a conversation written; None if it has no such way.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_ids: frozenset[int],
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.backend = backend
        self.eos_ids = eos_ids
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text`, with BOS and EOS as the checkpoint wants them.

        parse_special: whether text that looks like a special token (`<|im_end|>`) becomes that token. It should
            not for text that others wrote.

        Raises UsageError if the text is not valid Unicode.
        """
        return self._encode(text, parse_special=parse_special, policy=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the assistant's answer begins.

        Raises UsageError if the checkpoint has no chat template or its template refuses these messages.
        """
        if self.chat_template is None:
            raise UsageError("this checkpoint has no chat template: leave --chat out, or choose a chat model")
        return self._encode(self.chat_template.render(messages), parse_special=True, policy=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token(self, id_: int) -> str:
        """The text of one token, special tokens included, for people to read."""
        return self.backend.decode([id_], skip_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        """A new stream from ids to text."""
        return Detokenizer(self.backend, self.special_ids)

    def _encode(self, text: str, *, parse_special: bool, policy: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode at character {error.start}") from None
        self.backend.encode_special_tokens = not parse_special
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=policy).ids
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"the vocabulary has no tokens for this text ({error})") from error
        return ids
