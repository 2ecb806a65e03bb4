"""A tokenizer built from the vocabulary in a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.tokenizer import sentencepiece
from kvgen.tokenizer.pretokenizers import KEEPS_SPACE, PRE_TOKENIZERS
from kvgen.tokenizer.tokenizer import Tokenizer

# Control tokens that end a turn or a text. A file names one EOS, but a model may have been trained to stop at
# another as well; llama.cpp goes by the same names.
_END_NAMES = frozenset(
    {
        "<|endoftext|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "</s>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "<|eot|>",
        "<EOT>",
        "<end_of_utterance>",
    }
)
# No merging makes these, so one that is not marked as a control token is a slip of the file's converter. `</s>` is
# also the end of a struck-out text in HTML, which merging may well make.
_ALWAYS_CONTROL = _END_NAMES - {"</s>"}


class _TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, from the GGUF specification."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def read(raw: RawCheckpoint) -> Tokenizer:
    """Build the tokenizer of a byte-level (`gpt2`) or SentencePiece-style (`llama`) BPE vocabulary.

    Raises UnsupportedError for another kind, CheckpointError for one that does not hold together.
    """
    keys = raw.metadata
    model = keys.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{raw.path}: tokenizer.ggml.model {model!r} is not supported (byte-level BPE, 'gpt2', and "
            "SentencePiece-style BPE, 'llama', are)"
        )
    tokens = _strings(raw, "tokenizer.ggml.tokens")
    types = _types(raw, tokens)
    if model == "llama":
        tokens = _with_plain_spaces(tokens, types)
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.tokens has the same token twice")
    if model == "llama":
        backend, add_bos = _sentencepiece(raw, tokens, types), True
        keeps_space = KEEPS_SPACE.get(str(keys.get("general.architecture")))
    else:
        backend, add_bos = _byte_level(raw, tokens)
        keeps_space = None
    _add_tokens(backend, tokens, types, keeps_space)
    _add_policy(raw, backend, tokens, add_bos=add_bos)
    template = keys.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{raw.path}: tokenizer.chat_template is not a text")
    return Tokenizer(backend, _eos_ids(raw, tokens, types), template, _special_tokens(keys, tokens))


def _types(raw: RawCheckpoint, tokens: list[str]) -> list[Any]:
    types = _for_each_token(raw, "token_type", tokens, [_TokenType.NORMAL] * len(tokens))
    plain = (_TokenType.NORMAL, _TokenType.USER_DEFINED)
    return [
        _TokenType.CONTROL if type_ in plain and token in _ALWAYS_CONTROL else type_
        for token, type_ in zip(tokens, types, strict=True)
    ]


def _with_plain_spaces(tokens: list[str], types: list[Any]) -> list[str]:
    """User-defined tokens as texts have them, which is how they are found: most converters write them so, some not."""
    return [
        token.replace(sentencepiece.SPACE, " ") if type_ == _TokenType.USER_DEFINED else token
        for token, type_ in zip(tokens, types, strict=True)
    ]


def _byte_level(raw: RawCheckpoint, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer without its added tokens, and whether BOS comes first by default.

    Bytes that a vocabulary has no token for are dropped from texts, as by the model's own tokenizer: some lack a
    control character, or the first byte of planes that are hardly used.
    """
    name = raw.metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise UnsupportedError(
            f"{raw.path}: tokenizer.ggml.pre is missing, as in files of early 2024 and before, so it is not known how "
            "text is cut before merging: take a newer conversion"
        )
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(f"{raw.path}: tokenizer.ggml.pre {name!r} is not supported (kvgen has: {known})")
    try:
        pairs = (merge.split(" ") for merge in _strings(raw, "tokenizer.ggml.merges"))
        merges = [(left, right) for left, right in pairs]
    except ValueError:
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.merges has an entry that is not two tokens") from None
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab, merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.merges does not fit the vocabulary ({error})") from error
    backend = tokenizers.Tokenizer(bpe)
    if pre.normalizer is not None:
        backend.normalizer = pre.normalizer()
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(raw: RawCheckpoint, tokens: list[str], types: list[Any]) -> tokenizers.Tokenizer:
    scores = _for_each_token(raw, "scores", tokens, None)
    if not all(isinstance(score, (int, float)) and not math.isnan(score) for score in scores):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.scores are not numbers")
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == _TokenType.UNKNOWN), None)
    if unknown is None and not sentencepiece.BYTES.issubset(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.tokens has neither an unknown token nor one for each byte")
    return sentencepiece.build_backend(
        tokens,
        scores,
        [type_ == _TokenType.NORMAL for type_ in types],
        unknown,
        prefix_space=_flag(raw, "add_space_prefix", True),
    )


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], types: list[Any], keeps_space: frozenset[str] | None
) -> None:
    """Tokens that are found in the text before it is merged.

    Control tokens are special: `Tokenizer.encode` finds them only when asked. User-defined ones are always found.
    keeps_space: the tokens that leave the white space after them alone, if the others take it.
    """
    added: dict[int, bool] = {
        _TokenType.CONTROL: True,
        _TokenType.UNKNOWN: True,
        _TokenType.USER_DEFINED: False,
    }
    backend.add_tokens(
        [
            AddedToken(
                token,
                special=added[type_],
                normalized=False,
                rstrip=keeps_space is not None and token not in keeps_space,
            )
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in added
        ]
    )


def _for_each_token(raw: RawCheckpoint, name: str, tokens: list[str], default: list[Any] | None) -> list[Any]:
    values = raw.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, list) or len(values) != len(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.{name} does not have one entry for each token")
    return values


def _flag(raw: RawCheckpoint, name: str, default: bool) -> bool:
    value = raw.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.{name} is {value!r}, neither true nor false")
    return value


def _token_id(raw: RawCheckpoint, kind: str, tokens: list[str]) -> int | None:
    id_ = raw.metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if id_ is not None and not (type(id_) is int and 0 <= id_ < len(tokens)):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.{kind}_token_id is {id_!r}, not one of its tokens")
    return id_


def _add_policy(raw: RawCheckpoint, backend: tokenizers.Tokenizer, tokens: list[str], add_bos: bool) -> None:
    """Put BOS before and EOS after a text where the file, or the default of its kind, says so."""
    ends: list[tuple[str, int] | None] = []
    for kind, default in (("bos", add_bos), ("eos", False)):
        id_ = _token_id(raw, kind, tokens)
        wanted = _flag(raw, f"add_{kind}_token", default)
        if wanted and id_ is None:
            raise CheckpointError(f"{raw.path}: a {kind.upper()} token is wanted, but {kind}_token_id is missing")
        ends.append((tokens[id_], id_) if wanted and id_ is not None else None)
    bos, eos = ends
    if bos or eos:
        pieces = ([bos[0]] if bos else []) + ["$A"] + ([eos[0]] if eos else [])
        backend.post_processor = processors.TemplateProcessing(
            single=pieces, special_tokens=[end for end in ends if end]
        )


def _eos_ids(raw: RawCheckpoint, tokens: list[str], types: list[Any]) -> frozenset[int]:
    named = {_token_id(raw, kind, tokens) for kind in ("eos", "eot", "eom")}
    known = {id_ for id_, token in enumerate(tokens) if types[id_] == _TokenType.CONTROL and token in _END_NAMES}
    return frozenset(known | {id_ for id_ in named if id_ is not None})


def _special_tokens(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    ids = {
        "bos_token": keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token": keys.get("tokenizer.ggml.eos_token_id"),
        "unk_token": keys.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": keys.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: tokens[id_] for name, id_ in ids.items() if isinstance(id_, int) and 0 <= id_ < len(tokens)}


def _strings(raw: RawCheckpoint, key: str) -> list[str]:
    value = raw.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{raw.path}: {key} is missing or not a list of strings")
    return value
