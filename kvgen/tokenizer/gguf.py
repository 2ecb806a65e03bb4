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
from kvgen.tokenizer.chat import ChatTemplate
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
    """Build the tokenizer. Raises UnsupportedError for a kind of vocabulary that is not byte-level BPE."""
    keys = raw.metadata
    model = keys.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise UnsupportedError(
            f"{raw.path}: tokenizer.ggml.model {model!r} is not supported (byte-level BPE, 'gpt2', is)"
        )
    tokens = _strings(raw, "tokenizer.ggml.tokens")
    types = keys.get("tokenizer.ggml.token_type", [_TokenType.NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.token_type does not have one entry for each token")
    backend = _backend(raw, tokens, types)
    template = keys.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{raw.path}: tokenizer.chat_template is not a text")
    return Tokenizer(
        backend,
        _eos_ids(keys, tokens, types),
        None if template is None else ChatTemplate(template, _special_tokens(keys, tokens)),
    )


def _backend(raw: RawCheckpoint, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    name = raw.metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(f"{raw.path}: tokenizer.ggml.pre {name!r} is not supported (kvgen has: {known})")
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.tokens has the same token twice")
    try:
        pairs = (merge.split(" ") for merge in _strings(raw, "tokenizer.ggml.merges"))
        merges = [(left, right) for left, right in pairs]
    except ValueError:
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.merges has an entry that is not two tokens") from None
    try:
        bpe = models.BPE(vocab, merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{raw.path}: tokenizer.ggml.merges does not fit the vocabulary ({error})") from error
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    added: dict[int, bool] = {
        _TokenType.CONTROL: True,
        _TokenType.UNKNOWN: True,
        _TokenType.USER_DEFINED: False,
    }
    backend.add_tokens(
        [
            AddedToken(token, special=added[type_], normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in added
        ]
    )
    _add_policy(raw.path, backend, raw.metadata, tokens, add_bos=pre.add_bos)
    return backend


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


def _eos_ids(keys: Mapping[str, Any], tokens: list[str], types: list[int]) -> frozenset[int]:
    named = {keys.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    known = {id_ for id_, token in enumerate(tokens) if types[id_] == _TokenType.CONTROL and token in _END_NAMES}
    return frozenset(id_ for id_ in named | known if isinstance(id_, int))


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
