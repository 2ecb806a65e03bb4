"""The tokenizer, independent of the file format it was read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import tokenizers

from kvgen.errors import UsageError
from kvgen.tokenizer.chat import ChatTemplate, Message
from kvgen.tokenizer.detokenizer import Detokenizer
from kvgen.tokenizer.special_tokens import SpecialTokenEscaper, encode_text
from kvgen.tokenizer.vocabulary import Vocabulary

_MAX_UTF8_BYTES = 4  # of one character, each of which may be a token


class Tokenizer:
    """A vocabulary with its BOS, EOS and chat template.

        >>> ids = loaded.tokenizer.encode("Hello, world!")
        >>> ids, loaded.tokenizer.decode(ids)
        ([19556, 28, 905, 17], 'Hello, world!')

    vocabulary: a tokenizer of the `tokenizers` library, whose post-processor adds BOS and EOS. Subclasses have another,
        and override `backend`.
    eos_ids: the ids that end a completion.
    chat_template: a Jinja template, or None.
    special_tokens: variables for the template: `bos_token`, `eos_token`, ...
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        eos_ids: frozenset[int],
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self.eos_ids = eos_ids
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        added = vocabulary.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        assert isinstance(self._vocabulary, tokenizers.Tokenizer)
        return self._vocabulary

    @cached_property
    def _escaper(self) -> SpecialTokenEscaper:
        return SpecialTokenEscaper(self._vocabulary, lambda: self.backend)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._vocabulary.get_vocab()), default=0)

    def with_chat_template(self, source: str) -> Tokenizer:
        """Return the same tokenizer with a different chat template."""
        changed = copy(self)
        changed.chat_template = ChatTemplate(source, self.special_tokens)
        return changed

    def shares_vocabulary(self, other: Tokenizer) -> bool:
        """Return whether both map the same tokens to the same ids."""
        return self._vocabulary.get_vocab() == other._vocabulary.get_vocab()

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`, with BOS and EOS if the checkpoint adds them.

        parse_special: whether text such as `<|im_end|>` becomes a special token. Leave it off for untrusted text.

        Raises UsageError if the text is not valid Unicode.
        """
        return self._encode(text, parse_special=parse_special, add_special_tokens=True)

    def _encode(self, text: str, *, parse_special: bool, add_special_tokens: bool) -> list[int]:
        return encode_text(self.backend, text, parse_special=parse_special, add_special_tokens=add_special_tokens).ids

    def encode_chat(
        self, messages: Sequence[Message], *, parse_special: bool = False, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Return the ids of a conversation, up to the start of the assistant's answer.

        Special tokens of the template become tokens; text in messages that looks like one stays text, unless
        `parse_special`. If the template does not take a system message, it is prepended to the first user message.
        Messages may have more fields than `Message` for a template that knows them. tools: for such a template, in
        JSON types.

        Raises UsageError if there is no chat template or it refuses these messages, CheckpointError if it fails.
        """
        if self.chat_template is None:
            raise UsageError("this checkpoint has no chat template: leave --chat out, or choose a chat model")
        if parse_special or not any(self._escaper.is_needed(text) for text in texts([*messages, tools])):
            text = self.chat_template.render_with_system(messages, tools)
            return self._encode(text, parse_special=True, add_special_tokens=False)
        escape = self._escaper.escape
        escaped: list[Any] = [{**_mapped(message, escape), "role": message["role"]} for message in messages]
        return self._escaper.encode(self.chat_template.render_with_system(escaped, _mapped(tools, escape)))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens. Invalid UTF-8 becomes U+FFFD."""
        return self._vocabulary.decode(list(ids), skip_special_tokens=True)

    def token(self, id_: int) -> str:
        """Return the text of one token, which may be special."""
        return self._vocabulary.decode([id_], skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> Iterator[tuple[str, range]]:
        """Split a text into the smallest pieces of whole characters; yield each with the range of its tokens in `ids`.

        Special tokens are pieces of their own; the other pieces join to `decode(ids)`.

        Each step decodes from the start of the previous piece, since decoders treat the start of a text differently.
        Unlike a stream's detokenizer, it does not wait for the token after a run of byte tokens, which needs its own
        colour.
        """
        anchor = start = 0
        for place, id_ in enumerate(ids):
            known = len(self.decode(ids[anchor:start]))
            if id_ in self.special_ids:
                if start < place:
                    yield self.decode(ids[anchor:place])[known:], range(start, place)
                yield self.token(id_), range(place, place + 1)
                start = place + 1
                continue
            piece = self.decode(ids[anchor : place + 1])[known:]
            complete = not piece.endswith("\N{REPLACEMENT CHARACTER}") or place + 1 - start == _MAX_UTF8_BYTES
            if complete or place + 1 == len(ids):
                yield piece, range(start, place + 1)
                anchor, start = start, place + 1

    def detokenizer(self) -> Detokenizer:
        """Return a new detokenizer for a stream of ids."""
        return Detokenizer(self._vocabulary, self.special_ids)


def texts(value: Any) -> Iterator[str]:
    """Yield all texts in JSON types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from texts(part)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return JSON types with all texts but the keys changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value
