"""Encode text, and keep text in chat messages from becoming special tokens.

The `tokenizers` library can match either all special tokens in a text or none. So look-alikes in messages are escaped
with a mark before the template runs. Then any remaining special token is the template's; it is replaced by a
placeholder, an added token that the library always matches.
"""

from __future__ import annotations

import re
import secrets
import threading
from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property

import tokenizers

from kvgen.errors import UsageError
from kvgen.tokenizer.vocabulary import Vocabulary

# Characters for which other threads may wait. The library's `encode` keeps Python's lock. `encode_batch` does not, but
# starts threads, and from then on warns when the process forks.
_LONG = 10_000
_LOCK = threading.Lock()  # `encode_special_tokens` is a setting of the tokenizer, which threads share


def encode_text(
    backend: tokenizers.Tokenizer, text: str, *, parse_special: bool, add_special_tokens: bool
) -> tokenizers.Encoding:
    """Encode a text. Raises UsageError if it is not valid Unicode or has no tokens.

    add_special_tokens: whether to add the vocabulary's BOS and EOS.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not valid Unicode at character {error.start}") from None
    with _LOCK:
        backend.encode_special_tokens = not parse_special
        try:
            if len(text) < _LONG:
                return backend.encode(text, add_special_tokens=add_special_tokens)
            (encoding,) = backend.encode_batch([text], add_special_tokens=add_special_tokens)
            return encoding
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"the vocabulary has no tokens for this text ({error})") from error


class SpecialTokenEscaper:
    """Separate a chat template's special tokens from text in messages that looks like them."""

    def __init__(self, vocabulary: Vocabulary, complete: Callable[[], tokenizers.Tokenizer]) -> None:
        """complete: return the tokenizer; called when a message is escaped."""
        self._complete = complete
        added = vocabulary.get_added_tokens_decoder()
        self._special = {token.content: (id_, token) for id_, token in added.items() if token.special}
        self._text = {id_: text for text, (id_, _) in self._special.items()}
        # Random, so that no message can contain them. Digits survive what templates do to text.
        self._mark, self._secret = (str(secrets.randbits(64)) for _ in range(2))
        self._placeholder = re.compile(rf"<{self._secret}\.(\d+)>")
        texts = sorted(self._special, key=len, reverse=True)  # prefer the longest match
        alternatives = "|".join(map(re.escape, texts))
        self._pattern = re.compile(f"(?:{alternatives})(?!{self._mark})" if texts else r"(?!)")
        # With a normalizer, other texts can match a special token: `<S>` for `<s>`, for example.
        is_loose = any(token.normalized for _, token in self._special.values())
        self._is_loose = is_loose and vocabulary.normalizer is not None

    def is_needed(self, text: str) -> bool:
        """Return whether a message must be escaped. If none must, the library alone encodes correctly."""
        return self._is_loose or self._pattern.search(text) is not None

    def escape(self, text: str) -> str:
        """Insert a mark after the first character of each look-alike, where trimming does not remove it."""
        while self._pattern.search(text):  # again, because one may begin inside another
            text = self._pattern.sub(lambda match: f"{match[0][0]}{self._mark}{match[0][1:]}", text)
        return text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendered template: its special tokens become tokens, escaped ones stay text."""
        backend, special_ids = self._backend_with_placeholders
        text = self._pattern.sub(lambda match: self._name(self._special[match[0]][0]), text)
        text = text.replace(self._mark, "")
        while True:
            encoding = encode_text(backend, text, parse_special=False, add_special_tokens=False)
            spans = [span for id_, span in zip(encoding.ids, encoding.offsets, strict=True) if id_ in special_ids]
            ends = [end for _, end in spans]
            unmatched = []
            for match in self._placeholder.finditer(text):
                following = bisect_left(ends, match.end())
                if following == len(ends) or spans[following][0] > match.start():
                    unmatched.append(match)
            if not unmatched:
                return [special_ids.get(id_, id_) for id_ in encoding.ids]
            for match in reversed(unmatched):  # e.g. inside a word, where the special token would not match either
                text = text[: match.start()] + self._text[int(match[1])] + text[match.end() :]

    @cached_property
    def _backend_with_placeholders(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The tokenizer with a placeholder for each special token, and the special id of each placeholder's id.

        A placeholder is not special, but has the flags of its special token, so surrounding text is split the same way.
        """
        backend = tokenizers.Tokenizer.from_str(self._complete().to_str())
        placeholders = [
            tokenizers.AddedToken(
                self._name(id_),
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=token.normalized,
                special=False,
            )
            for id_, token in self._special.values()
        ]
        backend.add_tokens(placeholders)
        vocabulary = backend.get_vocab()
        return backend, {vocabulary[self._name(id_)]: id_ for id_, _ in self._special.values()}

    def _name(self, id_: int) -> str:
        return f"<{self._secret}.{id_}>"
