"""How the results of a file are made: model and settings, written beside it, so that a run is only gone on with alike.

It stands in a file of its own, `NAME.run.json`, because every line of the results is to be a result, and because a
digest in each line could not say what differs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvgen.checkpoint.digest import digest_of, source_file
from kvgen.errors import UsageError
from kvgen.generation.settings import Request
from kvgen.loading.load import Loaded
from kvgen.tokenizer.prompt import PromptFormat

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_LONGEST = 200  # of a value that is shown

Record = Mapping[str, Any]


def run_record(
    arguments: Mapping[str, Any],
    loaded: Loaded | None,
    defaults: Request,
    format: PromptFormat,
    chat_template: str | None,
    *,
    max_tokens_bounds_rows: bool,
) -> Record:
    """All that tokens depend on besides the rows, as JSON.

    arguments: of `kvgen.load`. loaded: what came of it; None where it is loaded elsewhere, and its files are not known.
    """
    values = asdict(defaults)
    del values["prompt"], values["top_logprobs"]
    sampling = values.pop("sampling")
    record = {
        **_model(arguments, loaded),
        **{name: str(value) for name, value in arguments.items() if name not in ("reference", "tokenizer")},
        **sampling,
        **values,
        "max_tokens_bounds_rows": max_tokens_bounds_rows,
        **asdict(format),
        "chat_template": chat_template,
    }
    plain: Record = json.loads(json.dumps(record))
    return plain


def _model(arguments: Mapping[str, Any], loaded: Loaded | None) -> dict[str, str | None]:
    """The model by name, and by the digests of what it was read from where that is known."""
    chosen = arguments["tokenizer"]
    if loaded is None:
        return {"model": str(arguments["reference"]), "weights": None, "tokenizer": str(chosen)}
    source = Path(loaded.source.rpartition(":")[0] if loaded.config is None else loaded.source)
    weights = loaded.files or (source_file(source),)  # of a model in Python, the file with its code
    if chosen in ("ids", "bytes"):
        tokenizer = str(chosen)
    else:
        names = [source / name for name in (*_TOKENIZER_FILES, *_TEMPLATE_FILES)]
        files = [path for path in names if path.is_file()] if chosen is None else [Path(chosen)]
        tokenizer = digest_of(map(source_file, files))
    return {"model": loaded.source, "weights": digest_of(weights), "tokenizer": tokenizer}


def record_path(results: Path) -> Path:
    """Where the record of a results file is."""
    return results.with_name(f"{results.name}.run.json")


def read_record(results: Path) -> Record | None:
    """The record of a results file; None if there is none. Raises UsageError for a damaged one."""
    path = record_path(results)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as what --resume goes by ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not written by kvgen batch")
    return value


def write_record(results: Path, record: Record) -> None:
    """Write it at once. Raises OSError."""
    path = record_path(results)
    with tempfile.TemporaryDirectory(prefix=".kvgen-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        with written.open("w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)


def differences(record: Record, before: Record) -> str:
    """What differs from the run before, for people; empty if nothing does. A model that only moved is the same one."""
    known = record.get("weights") is not None and before.get("weights") is not None
    ignored = {"model"} if known else {"weights", "tokenizer"}
    found = []
    for name in sorted((record.keys() | before.keys()) - ignored):
        if record.get(name) != before.get(name):
            of = "model" if name == "weights" and record.get("model") != before.get("model") else name
            found.append(f"{of} is {_shown(record.get(of))}, was {_shown(before.get(of))}")
    return "; ".join(found)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
