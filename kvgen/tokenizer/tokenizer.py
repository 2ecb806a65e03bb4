"""The tokenizer that the rest of kvgen sees, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import tokenizers

from kvgen.errors import UsageError
from kvgen.tokenizer.chat import ChatTemplate, Message
from kvgen.tokenizer.detokenizer import Detokenizer
from kvgen.tokenizer.lookalikes import LookAlikes, encode_with


class Tokenizer:
    """A vocabulary with its policies.

    backend: the tokenizer proper; its post-processor adds BOS and EOS where the checkpoint wants them.
    eos_ids: the ids that end a completion.
    chat_template: how the checkpoint wants a conversation written; None if it has no such way.
    special_tokens: what a template may name: `bos_token` and its like.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_ids: frozenset[int],
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.eos_ids = eos_ids
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)

    @cached_property
    def _look_alikes(self) -> LookAlikes:
        return LookAlikes(self.backend)

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same vocabulary with another template."""
        return type(self)(self.backend, self.eos_ids, source, self.special_tokens)

    def shares_vocabulary(self, other: Tokenizer) -> bool:
        """Whether both give every token the same id."""
        return self.backend.get_vocab() == other.backend.get_vocab()

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text`, with BOS and EOS as the checkpoint wants them.

        parse_special: whether text that looks like a special token (`<|im_end|>`) becomes that token. It should
            not for text that others wrote.

        Raises UsageError if the text is not valid Unicode.
        """
        return encode_with(self.backend, text, parse_special=parse_special, policy=True).ids

    def encode_chat(self, messages: Sequence[Message], *, parse_special: bool = False) -> list[int]:
        """The ids of a conversation, up to where the assistant's answer begins.

        The template's special tokens become tokens. What looks like one inside a message stays text, unless
        `parse_special`. A system message that the template has no place for goes before the first user's.

        Raises UsageError if the checkpoint has no chat template or its template refuses these messages.
        """
        if self.chat_template is None:
            raise UsageError("this checkpoint has no chat template: leave --chat out, or choose a chat model")
        look_alikes = self._look_alikes
        if parse_special or not any(look_alikes.may_be_in(message["content"]) for message in messages):
            text = self.chat_template.render_with_system(messages)
            return encode_with(self.backend, text, parse_special=True, policy=False).ids
        marked: list[Message] = [
            {"role": message["role"], "content": look_alikes.marked(message["content"])} for message in messages
        ]
        return look_alikes.encode(self.chat_template.render_with_system(marked))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token(self, id_: int) -> str:
        """The text of one token, special tokens included, for people to read."""
        return self.backend.decode([id_], skip_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        """A new stream from ids to text."""
        return Detokenizer(self.backend, self.special_ids)
