"""Text in messages that looks like a special token, and must not become one.

A chat template writes special tokens around messages, all in one text, and the library either finds every special token
in a text or none. So those in messages are marked before the template runs; what is not marked afterwards is the
template's own, and is replaced by a double that the library finds in any case.
"""

from __future__ import annotations

import re
import secrets
import threading
from bisect import bisect_left
from functools import cached_property

import tokenizers

from kvgen.errors import UsageError

_ONE_AT_A_TIME = threading.Lock()  # whether special tokens are found is a switch of a tokenizer, which threads share


def encode_with(backend: tokenizers.Tokenizer, text: str, *, parse_special: bool, policy: bool) -> tokenizers.Encoding:
    """Encode a text. policy: whether the vocabulary's own BOS and EOS are added. Raises UsageError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not valid Unicode at character {error.start}") from None
    with _ONE_AT_A_TIME:
        backend.encode_special_tokens = not parse_special
        try:
            return backend.encode(text, add_special_tokens=policy)
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"the vocabulary has no tokens for this text ({error})") from error


class LookAlikes:
    """Tells the special tokens of a chat template from texts in messages that look like them."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: (id_, token) for id_, token in added.items() if token.special}
        self._text = {id_: text for text, (id_, _) in self._special.items()}
        # Nobody can guess them, so nobody can type a mark or a double. Digits survive what templates do to text.
        self._mark, self._secret = (str(secrets.randbits(64)) for _ in range(2))
        self._double = re.compile(rf"<{self._secret}\.(\d+)>")
        texts = sorted(self._special, key=len, reverse=True)  # of those that begin at one place, the longest
        alternatives = "|".join(map(re.escape, texts))
        self._pattern = re.compile(f"(?:{alternatives})(?!{self._mark})" if texts else r"(?!)")
        # Such a vocabulary finds a special token in other texts than its own, `<s>` in `<S>` for example.
        self._is_loose = backend.normalizer is not None and any(token.normalized for _, token in self._special.values())

    def may_be_in(self, text: str) -> bool:
        """Whether a message needs `marked` and `encode`. Where none does, the library alone is enough."""
        return self._is_loose or self._pattern.search(text) is not None

    def marked(self, text: str) -> str:
        """A message with a mark in each look-alike.

        The mark comes after the first character, so no look-alike is left, and a template can trim the text.
        """
        while self._pattern.search(text):  # again, because one may begin inside another
            text = self._pattern.sub(lambda match: f"{match[0][0]}{self._mark}{match[0][1:]}", text)
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of what a template made of marked messages: special tokens are tokens, and what is marked is text."""
        backend, stands_for = self._doubles
        text = self._pattern.sub(lambda match: self._name(self._special[match[0]][0]), text)
        text = text.replace(self._mark, "")
        while True:
            encoding = encode_with(backend, text, parse_special=False, policy=False)
            spans = [span for id_, span in zip(encoding.ids, encoding.offsets, strict=True) if id_ in stands_for]
            ends = [end for _, end in spans]
            unseen = []
            for match in self._double.finditer(text):
                following = bisect_left(ends, match.end())  # of those that were seen, the first that ends no earlier
                if following == len(ends) or spans[following][0] > match.start():
                    unseen.append(match)
            if not unseen:
                return [stands_for.get(id_, id_) for id_ in encoding.ids]
            for match in reversed(unseen):  # there, inside a word perhaps, a special token would not be seen either
                text = text[: match.start()] + self._text[int(match[1])] + text[match.end() :]

    @cached_property
    def _doubles(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The vocabulary with a double for each special token, and which double stands for which.

        A double is an added token that is not special. It treats the text around it as its special token does: the
        space that it takes, the pieces that it parts.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        doubles = [
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
        backend.add_tokens(doubles)
        vocabulary = backend.get_vocab()
        return backend, {vocabulary[self._name(id_)]: id_ for id_, _ in self._special.values()}

    def _name(self, id_: int) -> str:
        return f"<{self._secret}.{id_}>"
