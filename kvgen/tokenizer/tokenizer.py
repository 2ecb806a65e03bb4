"""The tokenizer that the rest of kvgen sees, whatever file it came from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import cast

import tokenizers

from kvgen.errors import UsageError
from kvgen.tokenizer.chat import ChatTemplate, Message
from kvgen.tokenizer.detokenizer import Detokenizer


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
        self._special = {token.content: (id_, token) for id_, token in added.items() if token.special}
        self.special_ids = frozenset(id_ for id_, _ in self._special.values())

    def with_chat_template(self, source: str) -> Tokenizer:
        """The same vocabulary with another template."""
        return Tokenizer(self.backend, self.eos_ids, source, self.special_tokens)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text`, with BOS and EOS as the checkpoint wants them.

        parse_special: whether text that looks like a special token (`<|im_end|>`) becomes that token. It should
            not for text that others wrote.

        Raises UsageError if the text is not valid Unicode.
        """
        return self._encode(text, parse_special=parse_special, policy=True)

    def encode_chat(self, messages: Sequence[Message], *, parse_special: bool = False) -> list[int]:
        """The ids of a conversation, up to where the assistant's answer begins.

        The template's special tokens become tokens. What looks like one inside a message stays text, unless
        `parse_special`. A system message that the template has no place for goes before the first user's.

        Raises UsageError if the checkpoint has no chat template or its template refuses these messages.
        """
        if self.chat_template is None:
            raise UsageError("this checkpoint has no chat template: leave --chat out, or choose a chat model")
        look_alike = self._look_alike
        if parse_special or not any(look_alike.search(message["content"]) for message in messages):
            return self._encode(self.chat_template.render_with_system(messages), parse_special=True, policy=False)
        marked = [{**message, "content": look_alike.sub(_mark, message["content"])} for message in messages]
        return self._encode_marked(self.chat_template.render_with_system(cast("list[Message]", marked)))

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

    @cached_property
    def _look_alike(self) -> re.Pattern[str]:
        """The texts of the special tokens, the longest first."""
        texts = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")

    def _encode_marked(self, text: str) -> list[int]:
        """Ids of a text whose special tokens are tokens, but for those that `_mark` has marked.

        Piece by piece, because the library either finds all special tokens in a text or none.
        """
        ids: list[int] = []
        start, strip = 0, False
        for match in self._look_alike.finditer(text):
            id_, token = self._special[match[0]]
            ids += self._encode_piece(text[start : match.start()], lstrip=strip, rstrip=token.lstrip)
            ids.append(id_)
            start, strip = match.end(), token.rstrip
        return ids + self._encode_piece(text[start:], lstrip=strip, rstrip=False)

    def _encode_piece(self, text: str, *, lstrip: bool, rstrip: bool) -> list[int]:
        """A piece between special tokens, which may take the space beside them."""
        text = text.replace(_MARK, "")
        text = text.lstrip() if lstrip else text
        text = text.rstrip() if rstrip else text
        return self._encode(text, parse_special=False, policy=False)


_MARK = "\ufdd0"  # a code point that Unicode keeps free for such use: no text has it


def _mark(match: re.Match[str]) -> str:
    """A look-alike with a mark inside, so that it survives a template and is known again."""
    return f"{match[0][:1]}{_MARK}{match[0][1:]}"
