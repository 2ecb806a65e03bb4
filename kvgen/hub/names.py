"""Resolve a model name to local files: a path, a model of the catalogue, or a Hugging Face hub id.

Missing files are downloaded, unless $KVGEN_OFFLINE is set.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from kvgen.errors import NotFoundError, in_one_line
from kvgen.hub import catalogue
from kvgen.hub.catalogue import CATALOGUE, DEFAULT_MODEL, Progress
from kvgen.system import cache_dir

_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "*.safetensors",
]


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore download progress."""


def resolve(reference: str | Path | None = None, *, progress: Progress = no_progress) -> Path:
    """Return the file or folder of a model; None is $KVGEN_MODEL or the default model.

    Tries an existing path, then a name of the catalogue, then a hub id `owner/name`.
    Raises NotFoundError if none of them matches or the download fails.
    """
    reference = str(reference or default_reference())
    try:
        path = Path(reference).expanduser()
        if path.is_file() or path.is_dir():
            return path
    except (OSError, RuntimeError) as error:  # name too long, unknown user
        raise NotFoundError(f"model {reference[:60]!r}: not a valid path ({error.__class__.__name__})") from error
    if entry := CATALOGUE.get(reference):
        folder = cache_dir() / "models"
        present = catalogue.find(entry, folder)
        if present is None and is_offline():
            raise NotFoundError(f"model {reference!r} is not in {folder}: unset KVGEN_OFFLINE to download it")
        return present or catalogue.fetch(entry, folder, progress)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", reference) and path.suffix != ".gguf":
        return _hub_folder(reference, progress)
    raise NotFoundError(
        f"model {reference!r}: not a file or folder, not in the catalogue ({', '.join(CATALOGUE)}), not a hub id "
        "owner/name"
    )


def default_reference() -> str:
    """Return $KVGEN_MODEL or the default model."""
    return os.environ.get("KVGEN_MODEL") or DEFAULT_MODEL


def is_offline() -> bool:
    """Whether $KVGEN_OFFLINE forbids the network."""
    return os.environ.get("KVGEN_OFFLINE", "").lower() not in ("", "0", "false", "no")


def _hub_folder(repository: str, progress: Progress) -> Path:
    """Return the repository's snapshot in the Hugging Face cache, downloading it if it is missing or incomplete."""
    import huggingface_hub  # slow to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()

    def snapshot(*, local: bool) -> Path:
        bar = _progress_bar(repository, progress)
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=_HUB_FILES, local_files_only=local, tqdm_class=bar
            )
        )

    try:
        cached = snapshot(local=True)
        if is_offline() or is_whole(cached):
            return cached
    except (LocalEntryNotFoundError, FileNotFoundError):
        if is_offline():
            raise NotFoundError(
                f"model {repository!r} is not in the Hugging Face cache: unset KVGEN_OFFLINE to download it"
            ) from None
    except HFValidationError as error:
        raise NotFoundError(f"model {repository!r}: not a file or folder, and not a valid hub id") from error
    try:
        return snapshot(local=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise NotFoundError(f"model {repository!r}: download failed ({in_one_line(error)})") from error


def _progress_bar(repository: str, progress: Progress) -> type[Any]:
    """Return a tqdm class for huggingface_hub that shows nothing and calls `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    class ProgressBar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            # Ignore the bar that counts files, and the one of the network, which may count the same bytes again.
            self.counts_bytes = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            self.bytes = int(options.get("initial") or 0)

        def update(self, count: float | None = 1) -> None:
            if self.counts_bytes and self.total:
                self.bytes += int(count or 0)
                progress(repository, min(self.bytes, int(self.total)), int(self.total))

    return ProgressBar


def is_whole(folder: Path) -> bool:
    """Whether a snapshot has its config, tokenizer and all shards. An interrupted download does not."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        try:
            shards = [str(name) for name in json.loads(index.read_bytes())["weight_map"].values()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # damaged
            return False
    return all((folder / name).exists() for name in ("config.json", "tokenizer.json", *shards))
