"""Pre-tokenizers for byte-level BPE, by their names in GGUF files (`tokenizer.ggml.pre`).

Patterns and normalizers are those of the models' tokenizer.json files; llama.cpp omits the normalizers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.normalizers import NFC, Normalizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split


@dataclass(frozen=True)
class PreTokenizerSpec:
    """A pre-tokenizer and the settings that GGUF files leave out.

    build, normalizer: make the pre-tokenizer and the normalizer before it.
    ignore_merges: use a piece that is a token without merging.
    add_bos: whether to add BOS if the file does not say.
    """

    build: Callable[[], PreTokenizer]
    normalizer: Callable[[], Normalizer] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


def _split(*patterns: str) -> Callable[[], PreTokenizer]:
    def build() -> PreTokenizer:
        splits: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in patterns]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = _split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST)
_ONE_DIGIT = _split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST)
_LETTERS_AND_MARKS = _split(
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's fallback, written by converters that did not recognize the model
_DEFAULT = _split(
    r"[\p{P}$+<=>^~|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_SUPERWORDS = _split(r"\p{N}+", r"(?=(\d{3})+(?!\d))")  # digits in threes from the right; merges may join words


def _split_by_case(contractions: str, digits: str) -> Callable[[], PreTokenizer]:
    """Split words also where lower case is followed by upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{upper}*{lower}+{contractions}|{start}{upper}+{lower}*{contractions}"
    return _split(words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


PRE_TOKENIZERS = {
    name: spec
    for names, spec in (
        ("default", PreTokenizerSpec(_DEFAULT)),
        ("gpt-2 phi-2 granite-docling", PreTokenizerSpec(_gpt2)),
        ("olmo mpt", PreTokenizerSpec(_gpt2, NFC)),
        ("smollm starcoder refact codeshell", PreTokenizerSpec(_single_digits)),
        (
            "llama3 llama-v3 llama-bpe falcon3 pixtral",
            PreTokenizerSpec(_THREE_DIGITS, ignore_merges=True, add_bos=True),
        ),
        ("dbrx smaug-bpe", PreTokenizerSpec(_THREE_DIGITS)),
        ("stablelm2 qwen2 deepseek-r1-qwen", PreTokenizerSpec(_ONE_DIGIT, NFC)),
        ("qwen35", PreTokenizerSpec(_LETTERS_AND_MARKS, NFC)),
        ("tekken", PreTokenizerSpec(_split_by_case("", r"\p{N}"), ignore_merges=True, add_bos=True)),
        ("gpt-4o llama4", PreTokenizerSpec(_split_by_case(_CONTRACTIONS + "?", r"\p{N}{1,3}"))),
        ("superbpe", PreTokenizerSpec(_SUPERWORDS)),
    )
    for name in names.split()
}

# Architectures whose SentencePiece special tokens strip the white space after them, with the tokens that do not.
# GGUF files do not say it, and llama.cpp goes by name as well.
RSTRIP_EXCEPTIONS = {"phi3": frozenset({"<unk>", "<s>", "<|endoftext|>"})}
