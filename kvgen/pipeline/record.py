"""The run record of a results file: model and settings, in `NAME.run.json`, so that --resume continues with the same.

It is a separate file because every line of the results is a result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvgen.errors import UsageError
from kvgen.generation.settings import Request
from kvgen.system import atomic_file
from kvgen.tokenizer.prompt import PromptFormat

if TYPE_CHECKING:
    from kvgen.loading.load import Loaded

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_MAX_SHOWN = 200  # characters of a value in a message

Record = Mapping[str, Any]


def run_record(
    model: Mapping[str, Any],
    defaults: Request,
    format: PromptFormat,
    chat_template: str | None,
    *,
    max_tokens_bounds_rows: bool,
) -> Record:
    """Return everything that the tokens depend on besides the rows, as JSON values.

    model: see `describe_model`.
    """
    values = asdict(defaults)
    del values["prompt"], values["top_logprobs"]
    sampling = values.pop("sampling")
    record = {
        **model,
        **sampling,
        **values,
        "max_tokens_bounds_rows": max_tokens_bounds_rows,
        **asdict(format),
        "chat_template": chat_template,
    }
    plain: Record = json.loads(json.dumps(record))
    return plain


def describe_model(arguments: Mapping[str, Any], loaded: Loaded | None) -> dict[str, str | None]:
    """Return the part of a run record that describes the model: its name, digests of its files, how it computes.

    arguments: of `kvgen.load`. loaded: its result; None if the model is loaded elsewhere, and its files are unknown.
    """
    others = {name: str(value) for name, value in arguments.items() if name not in ("reference", "tokenizer")}
    return {**_describe_files(arguments, loaded), **others}


def _describe_files(arguments: Mapping[str, Any], loaded: Loaded | None) -> dict[str, str | None]:
    """Return the model's name, and digests of its files if they are known. tokenizer: None if it has no own files."""
    chosen = arguments["tokenizer"]
    if loaded is None:
        return {"model": str(arguments["reference"]), "weights": None, "tokenizer": str(chosen)}

    from kvgen.checkpoint.digest import digest_of, source_file  # imports torch

    source = Path(loaded.source.rpartition(":")[0] if loaded.config is None else loaded.source)
    weights = loaded.files or (source_file(source),)  # for a model in Python, its source file
    if chosen in ("ids", "bytes"):
        tokenizer: str | None = str(chosen)
    else:
        names = [source / name for name in (*_TOKENIZER_FILES, *_TEMPLATE_FILES)]
        files = [path for path in names if path.is_file()] if chosen is None else [Path(chosen)]
        tokenizer = digest_of(map(source_file, files)) if files else None  # a GGUF file contains it
    return {"model": loaded.source, "weights": digest_of(weights), "tokenizer": tokenizer}


def record_path(results: Path) -> Path:
    return results.with_name(f"{results.name}.run.json")


def read_record(results: Path) -> Record | None:
    """Return the record of a results file; None if there is none. Raises UsageError if it is damaged."""
    path = record_path(results)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: the run record that --resume needs cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not written by kvgen batch")
    return value


def write_record(results: Path, record: Record) -> None:
    """Write the record atomically. Raises OSError."""
    with atomic_file(record_path(results)) as file:
        file.write(json.dumps(record, indent=1).encode())


def differences(record: Record, before: Record) -> str:
    """Describe what differs from the previous run; empty if nothing. A model that only moved is the same."""
    known = record.get("weights") is not None and before.get("weights") is not None
    ignored = {"model", "adapter"} if known else {"weights", "tokenizer"}
    found = []
    for name in sorted((record.keys() | before.keys()) - ignored):
        if record.get(name) != before.get(name):
            shown = "model" if name == "weights" and record.get("model") != before.get("model") else name
            found.append(f"{shown} is {_shorten(record.get(shown))}, was {_shorten(before.get(shown))}")
    return "; ".join(found)


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
