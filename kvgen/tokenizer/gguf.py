"""Build a tokenizer from the vocabulary in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import tokenizers
from gguf import TokenType
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, processors

from kvgen.checkpoint import RawCheckpoint
from kvgen.checkpoint.strings import Strings
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.tokenizer import sentencepiece
from kvgen.tokenizer.pretokenizers import PRE_TOKENIZERS, RSTRIP_EXCEPTIONS
from kvgen.tokenizer.sentencepiece import SentencePieceTokenizer
from kvgen.tokenizer.tokenizer import Tokenizer
from kvgen.tokenizer.vocabulary import CompactVocabulary, TokenIds

# Control tokens that end a turn or a text. A file names one EOS, but a model may stop at others.
# llama.cpp has the same list.
_END_TOKENS = frozenset(
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
# Control tokens even if the converter forgot to mark them. Not `</s>`: it is an HTML tag that merging may produce.
_ALWAYS_CONTROL = _END_TOKENS - {"</s>"}


def read(raw: RawCheckpoint) -> Tokenizer:
    """Build the tokenizer of a byte-level (`gpt2`) or SentencePiece-style (`llama`) BPE vocabulary.

    Raises UnsupportedError for other kinds, CheckpointError for an inconsistent vocabulary.
    """
    model = raw.metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(f"{raw.path}: tokenizer.ggml.model {model!r} is not supported ('gpt2' and 'llama' are)")
    tokens = _read_strings(raw, "tokens")
    types = _read_types(raw, tokens)
    if model == "llama":
        tokens = _with_plain_spaces(tokens, np.flatnonzero(types == TokenType.USER_DEFINED).tolist())
    vocab = TokenIds(tokens) if model == "llama" else {token: id_ for id_, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.tokens has the same token twice")
    for id_ in (vocab[token] for token in _ALWAYS_CONTROL & vocab.keys()):
        if types[id_] in (TokenType.NORMAL, TokenType.USER_DEFINED):
            types[id_] = TokenType.CONTROL
    if isinstance(vocab, TokenIds):
        backend, add_bos = _build_sentencepiece(raw, vocab, tokens, types), True
        rstrip_exceptions = RSTRIP_EXCEPTIONS.get(str(raw.metadata.get("general.architecture")))
    else:
        backend, add_bos = _build_byte_level(raw, vocab)
        rstrip_exceptions = None
    _add_tokens(backend, tokens, types, rstrip_exceptions)
    _add_bos_and_eos(raw, backend, tokens, add_bos=add_bos)
    template = raw.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{raw.path}: tokenizer.chat_template is not a string")
    settings = _read_eos_ids(raw, vocab, types), template, _read_special_tokens(raw, tokens)
    if isinstance(vocab, dict):
        return Tokenizer(backend, *settings)
    vocabulary = CompactVocabulary(vocab, backend)
    return SentencePieceTokenizer(vocabulary, _read_scores(raw, tokens), types == TokenType.NORMAL, *settings)


def _read_types(raw: RawCheckpoint, tokens: Strings) -> NDArray[Any]:
    types = _read_per_token(raw, "token_type", tokens, [TokenType.NORMAL] * len(tokens))
    if types.dtype.kind not in "biu":
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.token_type must be integers")
    return types


def _build_byte_level(raw: RawCheckpoint, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """Return the tokenizer without added tokens, and whether to add BOS by default.

    Bytes without a token are dropped from text, as the models' own tokenizers do.
    """
    name = raw.metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise UnsupportedError(
            f"{raw.path}: tokenizer.ggml.pre is missing, as in files from early 2024 or before; use a newer conversion"
        )
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(f"{raw.path}: tokenizer.ggml.pre {name!r} is not supported (supported: {known})")
    try:
        pairs = (merge.split(" ") for merge in _read_strings(raw, "merges"))
        merges = [(left, right) for left, right in pairs]
    except ValueError:
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.merges has an entry that is not two tokens") from None
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


def _build_sentencepiece(
    raw: RawCheckpoint, vocab: Mapping[str, int], tokens: Strings, types: NDArray[Any]
) -> tokenizers.Tokenizer:
    unknown = next((tokens[id_] for id_ in np.flatnonzero(types == TokenType.UNKNOWN).tolist()), None)
    if unknown is None and not vocab.keys() >= sentencepiece.BYTES:
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.tokens has neither an unknown token nor all byte tokens")
    prefix_space = _read_flag(raw, "add_space_prefix", True)
    added = {tokens[id_]: id_ for id_ in _matched(types).tolist()}
    return sentencepiece.build_settings(added, unknown, prefix_space=prefix_space)


def _read_scores(raw: RawCheckpoint, tokens: Strings) -> NDArray[Any]:
    scores = _read_per_token(raw, "scores", tokens, None)
    if scores.dtype.kind not in "biuf" or np.isnan(scores).any():
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.scores must be numbers")
    return scores


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: Strings, types: NDArray[Any], rstrip_exceptions: frozenset[str] | None
) -> None:
    """Add the tokens that are matched in text before merging: special ones on request, user-defined ones always."""
    matched = _matched(types)
    is_special = types[matched] != TokenType.USER_DEFINED
    backend.add_tokens(
        [
            AddedToken(
                tokens[id_],
                special=special,
                normalized=False,
                rstrip=rstrip_exceptions is not None and tokens[id_] not in rstrip_exceptions,
            )
            for id_, special in zip(matched.tolist(), is_special.tolist(), strict=True)
        ]
    )


def _matched(types: NDArray[Any]) -> NDArray[np.int64]:
    """Return the ids of tokens that are matched in text before merging."""
    return np.flatnonzero(np.isin(types, (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)))


def _read_per_token(raw: RawCheckpoint, name: str, tokens: Strings, default: list[Any] | None) -> NDArray[Any]:
    """Return a copy, (V)."""
    values = raw.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, list | Strings) or len(values) != len(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.{name} must have one entry per token")
    values = list(values)
    return np.array(values, dtype=object if any(isinstance(value, list) for value in values[:1]) else None)


def _read_flag(raw: RawCheckpoint, name: str, default: bool) -> bool:
    value = raw.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.{name} is {value!r}; it must be true or false")
    return value


def _read_token_id(raw: RawCheckpoint, kind: str, tokens: Sized) -> int | None:
    id_ = raw.metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if id_ is not None and not (type(id_) is int and 0 <= id_ < len(tokens)):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.{kind}_token_id is {id_!r}, outside the vocabulary")
    return id_


def _add_bos_and_eos(raw: RawCheckpoint, backend: tokenizers.Tokenizer, tokens: Strings, add_bos: bool) -> None:
    """Add BOS before and EOS after a text if the file, or the default for its kind, says so."""
    pieces, special = ["$A"], []
    for kind, default, at in (("bos", add_bos, 0), ("eos", False, 2)):
        id_ = _read_token_id(raw, kind, tokens)
        if _read_flag(raw, f"add_{kind}_token", default):
            if id_ is None:
                raise CheckpointError(f"{raw.path}: add_{kind}_token is set, but {kind}_token_id is missing")
            pieces.insert(at, tokens[id_])
            special.append((tokens[id_], id_))
    if special:
        backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)


def _read_eos_ids(raw: RawCheckpoint, vocab: Mapping[str, int], types: NDArray[Any]) -> frozenset[int]:
    named = {_read_token_id(raw, kind, vocab) for kind in ("eos", "eot", "eom")}
    known = {vocab[token] for token in _END_TOKENS & vocab.keys() if types[vocab[token]] == TokenType.CONTROL}
    return frozenset(known | {id_ for id_ in named if id_ is not None})


def _read_special_tokens(raw: RawCheckpoint, tokens: Strings) -> dict[str, str]:
    kinds = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: raw.metadata.get(f"tokenizer.ggml.{kind}_token_id") for name, kind in kinds.items()}
    return {name: tokens[id_] for name, id_ in ids.items() if isinstance(id_, int) and 0 <= id_ < len(tokens)}


def _read_strings(raw: RawCheckpoint, name: str) -> Strings:
    value = raw.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, Strings):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.{name} is missing or not a list of strings")
    return value


def _with_plain_spaces(tokens: Strings, ids: Sequence[int]) -> Strings:
    """Return the tokens, with plain spaces in those with `ids`: most converters write them so, some do not."""
    changed = {id_: tokens[id_].replace(sentencepiece.SPACE, " ") for id_ in ids if sentencepiece.SPACE in tokens[id_]}
    return Strings.of(changed.get(id_, token) for id_, token in enumerate(tokens)) if changed else tokens
