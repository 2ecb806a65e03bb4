"""Read the tokenizer of a Hugging Face folder: tokenizer.json and the settings beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from kvgen.checkpoint import RawCheckpoint
from kvgen.checkpoint.raw import MAX_TEXT_BYTES, check_file, read_json_object
from kvgen.errors import CheckpointError, UnsupportedError
from kvgen.tokenizer.tokenizer import Tokenizer


def read(raw: RawCheckpoint) -> Tokenizer:
    """Read the tokenizer, EOS ids and chat template of a folder. Raises CheckpointError or UnsupportedError."""
    backend = read_backend(raw.path / "tokenizer.json")
    settings = _read_optional(raw.path / "tokenizer_config.json")
    special_tokens = {}
    for name, value in settings.items():  # each token is a string, or an object with the string as its content
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            special_tokens[name] = token
    eos_ids = _read_eos_ids(raw, backend.token_to_id(special_tokens.get("eos_token", "")))
    return Tokenizer(backend, eos_ids, _read_chat_template(raw.path, settings), special_tokens)


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json. Raises UnsupportedError if it is missing, CheckpointError if it is damaged."""
    if not path.exists():
        raise UnsupportedError(
            f"{path.parent}: has no {path.name}; save it with the model's fast tokenizer, or give --tokenizer"
        )
    check_file(path, max_bytes=MAX_TEXT_BYTES)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        check_file(path, max_bytes=MAX_TEXT_BYTES)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
    path, template = folder / "tokenizer_config.json", settings.get("chat_template")
    if isinstance(template, list):  # named templates; `default` is for plain conversations
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[-1].get("template") if entries else None
    old = folder / "chat_template.json"
    if template is None and old.exists():
        template, path = read_json_object(old).get("chat_template"), old
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template must be a string")
    return template


def _read_eos_ids(raw: RawCheckpoint, default: int | None) -> frozenset[int]:
    """Return the EOS ids of generation_config.json, else of config.json, else the tokenizer's."""
    for source in (_read_optional(raw.path / "generation_config.json"), raw.metadata):
        value = source.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(id_) is int for id_ in ids):
                raise CheckpointError(f"{raw.path}: eos_token_id is {value!r}; it must be a token id or a list of them")
            return frozenset(ids)
    return frozenset() if default is None else frozenset({default})
