"""How byte-level BPE vocabularies cut text before merging, by the names that llama.cpp writes into GGUF files.

The patterns are those of the models' own tokenizer.json files, which llama.cpp imitates; so are the normalizers, which
it leaves out. Beside them stands what else files of a kind do not say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.normalizers import NFC, Normalizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split


@dataclass(frozen=True)
class PreTokenizerSpec:
    """build: makes the pre-tokenizer. normalizer: makes what changes the text before it, if anything does.
    ignore_merges: a piece that is a token is taken whole. add_bos: whether BOS comes first if the file does not say."""

    build: Callable[[], PreTokenizer]
    normalizer: Callable[[], Normalizer] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], PreTokenizer]:
    return lambda: Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = _split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST)
_ONE_DIGIT = _split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST)
_LETTERS_AND_MARKS = _split(
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _default() -> PreTokenizer:
    """llama.cpp's own, of no model: converters wrote `default` where they did not know better."""
    patterns = [
        r"[\p{P}$+<=>^~|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    ]
    splits: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _superwords() -> PreTokenizer:
    """Merges may join words; only digits are cut, in threes from the right."""
    splits: list[PreTokenizer] = [Split(Regex(p), "isolated") for p in (r"\p{N}+", r"(?=(\d{3})+(?!\d))")]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _by_case(contractions: str, digits: str) -> Callable[[], PreTokenizer]:
    """Words are cut where lower case turns into upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{upper}*{lower}+{contractions}|{start}{upper}+{lower}*{contractions}"
    return _split(words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


_GPT2 = PreTokenizerSpec(_gpt2)
_GPT2_NFC = PreTokenizerSpec(_gpt2, NFC)
_DIGITS = PreTokenizerSpec(_single_digits)
_LLAMA3 = PreTokenizerSpec(_THREE_DIGITS, ignore_merges=True, add_bos=True)
_ONE_DIGIT_NFC = PreTokenizerSpec(_ONE_DIGIT, NFC)
_GPT4O = PreTokenizerSpec(_by_case(_CONTRACTIONS + "?", r"\p{N}{1,3}"))

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    "default": PreTokenizerSpec(_default),
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "granite-docling": _GPT2,
    "olmo": _GPT2_NFC,
    "mpt": _GPT2_NFC,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": PreTokenizerSpec(_THREE_DIGITS),
    "smaug-bpe": PreTokenizerSpec(_THREE_DIGITS),
    "stablelm2": _ONE_DIGIT_NFC,
    "qwen2": _ONE_DIGIT_NFC,
    "deepseek-r1-qwen": _ONE_DIGIT_NFC,
    "qwen35": PreTokenizerSpec(_LETTERS_AND_MARKS, NFC),
    "tekken": PreTokenizerSpec(_by_case("", r"\p{N}"), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "superbpe": PreTokenizerSpec(_superwords),
}

# Architectures whose SentencePiece-style vocabularies have special tokens that take the white space after them, and
# which of their tokens do not. It is in the models' tokenizer.json; of GGUF files llama.cpp knows it by name as well.
KEEPS_SPACE = {"phi3": frozenset({"<unk>", "<s>", "<|endoftext|>"})}
