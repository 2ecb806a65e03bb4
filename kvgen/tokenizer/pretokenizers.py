"""How byte-level BPE vocabularies cut text before merging, by the names that llama.cpp writes into GGUF files.

The patterns are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split


@dataclass(frozen=True)
class PreTokenizerSpec:
    """build: makes the pre-tokenizer. ignore_merges: a piece that is a token is taken whole.
    add_bos: whether BOS comes first if the file does not say."""

    build: Callable[[], PreTokenizer]
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


def _llama3() -> PreTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_LLAMA3 = PreTokenizerSpec(_llama3, ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    "gpt-2": PreTokenizerSpec(_gpt2),
    "smollm": PreTokenizerSpec(_single_digits),
    "starcoder": PreTokenizerSpec(_single_digits),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
}
