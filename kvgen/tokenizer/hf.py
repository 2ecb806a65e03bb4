"""The tokenizer of a Hugging Face folder: tokenizer.json and the small files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from kvgen.checkpoint import RawCheckpoint
from kvgen.checkpoint.raw import MAX_TEXT_BYTES, check_file, read_json_object
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.tokenizer.tokenizer import Tokenizer


def read(raw: RawCheckpoint) -> Tokenizer:
    """Read tokenizer.json of a folder, and the small files beside it if they are there."""
    backend = read_backend(raw.path / "tokenizer.json")
    settings = _optional_object(raw.path / "tokenizer_config.json")
    generation = _optional_object(raw.path / "generation_config.json")
    special_tokens = _special_tokens(settings)
    eos_ids = _eos_ids(raw.path, backend, generation, raw.metadata, special_tokens)
    return Tokenizer(backend, eos_ids, _chat_template(raw.path, settings), special_tokens)


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Raises UnsupportedError if it is not there, CheckpointError if it is damaged."""
    if not path.exists():
        raise UnsupportedError(f"{path.parent}: has no {path.name}; save it with the model's fast tokenizer")
    check_file(path, most=MAX_TEXT_BYTES)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _optional_object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like; each is a string or an object with the string as its content."""
    tokens = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        check_file(path, most=MAX_TEXT_BYTES)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
    path, template = folder / "tokenizer_config.json", settings.get("chat_template")
    if isinstance(template, list):  # several by name; `default` is the one for plain conversations
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    old = folder / "chat_template.json"
    if template is None and old.exists():
        template, path = read_json_object(old).get("chat_template"), old
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is not a template")
    return template


def _eos_ids(
    folder: Path,
    backend: tokenizers.Tokenizer,
    generation: dict[str, Any],
    config: Any,
    special_tokens: dict[str, str],
) -> frozenset[int]:
    """What ends a completion: generation_config.json says it, else config.json, else the tokenizer's EOS."""
    for source in (generation, config):
        value = source.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(id_) is int for id_ in ids):
                raise CheckpointError(f"{folder}: eos_token_id is {value!r}; it must be a token id or a list of them")
            return frozenset(ids)
    id_ = backend.token_to_id(special_tokens.get("eos_token", ""))
    return frozenset() if id_ is None else frozenset({id_})
