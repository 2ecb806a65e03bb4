"""Built-in tokenizers that need no file: bytes, and token ids written as numbers."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kvgen.errors import UsageError
from kvgen.tokenizer.tokenizer import Tokenizer


def bytes_tokenizer() -> Tokenizer:
    """Return a tokenizer whose 256 ids are the bytes of UTF-8 text."""
    backend = tokenizers.Tokenizer(models.BPE({char: byte for byte, char in enumerate(_byte_chars())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, frozenset())


def ids_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer for models without text: "5 17 3" is [5, 17, 3]."""
    backend = tokenizers.Tokenizer(models.WordLevel({str(id_): id_ for id_ in range(vocab_size)}, unk_token="none"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _IdsTokenizer(backend, frozenset())


class _IdsTokenizer(Tokenizer):
    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        wrong = next((word for word in text.split() if self.backend.token_to_id(word) is None), None)
        if wrong is not None:
            last = self.backend.get_vocab_size() - 1
            raise UsageError(f"{wrong!r:.40} is not a token id of this model: give integers from 0 to {last}")
        return super().encode(text, parse_special=parse_special)


def _byte_chars() -> list[str]:
    """Return the character for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
