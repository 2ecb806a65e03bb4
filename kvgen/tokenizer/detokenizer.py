"""Streaming detokenization: release text as soon as later tokens cannot change it."""

from __future__ import annotations

from kvgen.tokenizer.vocabulary import Vocabulary

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turn a stream of ids into pieces of text that add up to `decode(all ids)` and never split a character.

    Held back: a trailing U+FFFD, which may be an incomplete character (an unfinished UTF-8 sequence decodes to exactly
    one), and runs of byte-fallback tokens (`<0xE4>`), which are decoded together.

    Each step decodes a window that starts at a token already released, because a vocabulary may treat the first token
    of a text differently (drop its leading space).
    """

    def __init__(self, vocabulary: Vocabulary, special_ids: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._special_ids = special_ids
        fallback = (vocabulary.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte_ids = frozenset(id_ for id_ in fallback if id_ is not None)
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text
        self._in_bytes = False

    def add(self, id_: int) -> str:
        """Add an id; return the text that it releases, possibly empty."""
        self._window.append(id_)
        if self._has_text(id_):
            self._in_bytes = id_ in self._byte_ids
        if self._in_bytes:
            return ""
        text = self._decode(self._window)
        released = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._emitted : released]
        if released == len(text) and self._has_text(id_):
            self._window = [id_]
            self._emitted = len(self._decode(self._window))
        else:
            self._emitted = max(self._emitted, released)
        return piece

    def flush(self) -> str:
        """End the stream; return the text held back."""
        text = self._decode(self._window)
        piece = text[self._emitted :]
        self._window, self._emitted, self._in_bytes = [], 0, False
        return piece

    def _has_text(self, id_: int) -> bool:
        return id_ not in self._special_ids and self._vocabulary.id_to_token(id_) is not None

    def _decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids, skip_special_tokens=True)
