"""A tokenizer built from the vocabulary in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from kvgen.checkpoint import RawCheckpoint
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.tokenizer import sentencepiece
from kvgen.tokenizer.pretokenizers import PRE_TOKENIZERS
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
    }
)


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
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.tokens has the same token twice")
    types = _for_each_token(raw, "token_type", tokens, [_TokenType.NORMAL] * len(tokens))
    if model == "llama":
        backend, add_bos = _sentencepiece(raw, tokens, types), True
    else:
        backend, add_bos = _byte_level(raw, tokens)
    _add_tokens(backend, tokens, types)
    _add_policy(raw.path, backend, keys, tokens, add_bos=add_bos)
    template = keys.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{raw.path}: tokenizer.chat_template is not a text")
    return Tokenizer(backend, _eos_ids(raw, tokens, types), template, _special_tokens(keys, tokens))


def _byte_level(raw: RawCheckpoint, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer without its added tokens, and whether BOS comes first by default."""
    name = raw.metadata.get("tokenizer.ggml.pre")
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
    if not all(isinstance(score, float) for score in scores):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.scores are not numbers")
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == _TokenType.UNKNOWN), None)
    return sentencepiece.build_backend(
        tokens,
        scores,
        [type_ == _TokenType.NORMAL for type_ in types],
        unknown,
        prefix_space=bool(raw.metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[Any]) -> None:
    """Tokens that are found in the text before it is merged.

    Control tokens are special: `Tokenizer.encode` finds them only when asked. User-defined ones are always found;
    one with SentencePiece's sign for a space is sought where texts have it, after normalization.
    """
    added: dict[int, bool] = {
        _TokenType.CONTROL: True,
        _TokenType.UNKNOWN: True,
        _TokenType.USER_DEFINED: False,
    }
    backend.add_tokens(
        [
            AddedToken(token, special=added[type_], normalized=sentencepiece.SPACE in token)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in added
        ]
    )


def _for_each_token(raw: RawCheckpoint, name: str, tokens: list[str], default: list[Any] | None) -> list[Any]:
    values = raw.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, list) or len(values) != len(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.{name} does not have one entry for each token")
    return values


def _add_policy(
    path: Path, backend: tokenizers.Tokenizer, keys: Mapping[str, Any], tokens: list[str], add_bos: bool
) -> None:
    """Put BOS before and EOS after a text where the file, or the default of its kind, says so."""
    ends = []
    for kind, default in (("bos", add_bos), ("eos", False)):
        wanted = keys.get(f"tokenizer.ggml.add_{kind}_token", default)
        id_ = keys.get(f"tokenizer.ggml.{kind}_token_id")
        if wanted and not (isinstance(id_, int) and 0 <= id_ < len(tokens)):
            raise CheckpointError(f"{path}: a {kind.upper()} token is wanted, but {kind}_token_id is {id_!r}")
        ends.append((tokens[id_], id_) if wanted and isinstance(id_, int) else None)
    bos, eos = ends
    if bos or eos:
        pieces = ([bos[0]] if bos else []) + ["$A"] + ([eos[0]] if eos else [])
        backend.post_processor = processors.TemplateProcessing(
            single=pieces, special_tokens=[end for end in ends if end]
        )


def _eos_ids(raw: RawCheckpoint, tokens: list[str], types: list[int]) -> frozenset[int]:
    named = {kind: raw.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    for kind, id_ in named.items():
        if id_ is not None and not (isinstance(id_, int) and 0 <= id_ < len(tokens)):
            raise CheckpointError(f"{raw.path}: tokenizer.ggml.{kind}_token_id is {id_!r}, not one of its tokens")
    known = {id_ for id_, token in enumerate(tokens) if types[id_] == _TokenType.CONTROL and token in _END_NAMES}
    return frozenset(known | {id_ for id_ in named.values() if id_ is not None})


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
