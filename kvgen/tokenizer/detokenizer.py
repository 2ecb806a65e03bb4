"""Ids in, text out, as early as the text is certain."""

from __future__ import annotations

import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns a stream of ids into text whose pieces add up to `decode(all ids)`, without half a character.

    Two kinds of text are held back until later ids settle them. In a byte-level vocabulary a trailing U+FFFD may
    be the start of a character; only the last one can be, since an unfinished UTF-8 sequence decodes to exactly
    one. In a vocabulary with byte fallback (`<0xE4>`), a run of byte tokens is decoded as a whole.

    The window of ids that is decoded again on each step starts at a token whose text is out already, because a
    vocabulary may treat the first token of a text specially (a leading space is dropped).
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        fallback = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte_ids = frozenset(id_ for id_ in fallback if id_ is not None)
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that are out
        self._in_bytes = False

    def add(self, id_: int) -> str:
        """The text that has become certain with one more id; often the token's own, at times empty."""
        self._window.append(id_)
        if self._has_text(id_):
            self._in_bytes = id_ in self._byte_ids
        if self._in_bytes:
            return ""
        text = self._decode(self._window)
        certain = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._emitted : certain]
        if certain == len(text) and self._has_text(id_):
            self._window = [id_]
            self._emitted = len(self._decode(self._window))
        else:
            self._emitted = max(self._emitted, certain)
        return piece

    def flush(self) -> str:
        """What is still held back, at the end of the stream."""
        text = self._decode(self._window)
        piece = text[self._emitted :]
        self._window, self._emitted, self._in_bytes = [], 0, False
        return piece

    def _has_text(self, id_: int) -> bool:
        """Whether a token is part of the text: special ones are left out, as are ids without a token."""
        return id_ not in self._special_ids and self._backend.id_to_token(id_) is not None

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)
