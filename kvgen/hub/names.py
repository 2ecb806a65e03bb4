"""From a reference to files on this machine: paths, the built-in catalogue, the Hugging Face hub.

Nothing is downloaded unless the caller names a model that is not here yet, and nothing at all with
$KVGEN_OFFLINE set.
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
    """The `Progress` of a caller who does not want to know."""


def resolve(reference: str | Path | None = None, *, progress: Progress = no_progress) -> Path:
    """The file or folder that `reference` means; None is $KVGEN_MODEL or the default model.

    Tried in this order: a path that exists, a name of the catalogue, a hub id `owner/name`.
    Raises NotFoundError if none of them fits or the files cannot be had.
    """
    reference = str(reference or default_reference())
    try:
        path = Path(reference).expanduser()
        if path.is_file() or path.is_dir():
            return path
    except (OSError, RuntimeError) as error:  # a name too long, a user that does not exist
        raise NotFoundError(f"model {reference[:60]!r}: cannot be looked up ({error.__class__.__name__})") from error
    if entry := CATALOGUE.get(reference):
        folder = cache_dir() / "models"
        present = catalogue.find(entry, folder)
        if present is None and is_offline():
            raise NotFoundError(
                f"model {reference!r} is not in {folder} and KVGEN_OFFLINE is set: unset it once to fetch the model"
            )
        return present or catalogue.fetch(entry, folder, progress)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", reference) and path.suffix != ".gguf":
        return _hub_folder(reference, progress)
    raise NotFoundError(
        f"model {reference!r}: no such file or folder, and neither a name of the catalogue "
        f"({', '.join(CATALOGUE)}) nor a hub id owner/name"
    )


def default_reference() -> str:
    """What is meant where no model is named: $KVGEN_MODEL, or the default model."""
    return os.environ.get("KVGEN_MODEL") or DEFAULT_MODEL


def is_offline() -> bool:
    """Whether $KVGEN_OFFLINE forbids the network."""
    return os.environ.get("KVGEN_OFFLINE", "").lower() not in ("", "0", "false", "no")


def _hub_folder(repository: str, progress: Progress) -> Path:
    """The repository's snapshot: from the hub's own cache if it is whole there, else downloaded into it."""
    import huggingface_hub  # here because it is slow to import and seldom needed
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # a library keeps off the terminal
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(*, local: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=_HUB_FILES,
                local_files_only=local,
                tqdm_class=_reporter(repository, progress),
            )
        )

    try:
        cached = snapshot(local=True)
        if is_offline() or is_whole(cached):
            return cached
    except (LocalEntryNotFoundError, FileNotFoundError):
        if is_offline():
            raise NotFoundError(
                f"model {repository!r} is not in the hub's cache and KVGEN_OFFLINE is set: unset it once to fetch it"
            ) from None
    except HFValidationError as error:
        raise NotFoundError(f"model {repository!r}: no such file or folder, and not a valid hub id") from error
    try:
        return snapshot(local=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = in_one_line(error)
        raise NotFoundError(f"model {repository!r} is no local path and could not be fetched: {reason}") from error


def _reporter(repository: str, progress: Progress) -> type[Any]:
    """What the hub's library takes for a progress bar: a class whose objects show nothing and tell `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            # Not the bar that counts files, nor that of the network, which may count the same bytes again.
            self.is_for_bytes = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            self.bytes = int(options.get("initial") or 0)

        def update(self, count: float | None = 1) -> None:
            if self.is_for_bytes and self.total:
                self.bytes += int(count or 0)
                progress(repository, min(self.bytes, int(self.total)), int(self.total))

    return Reporter


def is_whole(folder: Path) -> bool:
    """Whether a snapshot has all that a checkpoint needs; a download that was interrupted leaves less."""
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        try:
            shards = [str(name) for name in json.loads(index.read_bytes())["weight_map"].values()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # damaged
            return False
    return all((folder / name).exists() for name in ("config.json", "tokenizer.json", *shards))
