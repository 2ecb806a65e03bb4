"""A strict reader of `quantization_config` in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvgen.errors import CheckpointError, UnsupportedError

T = TypeVar("T", int, str, bool)


class Settings:
    """The fields in `values`, read from the file `path`. `prefix` is where they are in the file."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix

    def get(self, name: str) -> Any:
        """Return the raw value; None if it is absent or null."""
        return self.values.get(name)

    def choice(self, name: str, options: Sequence[T], default: T | None = None) -> T:
        """Return one of `options`. Raises UnsupportedError for another value."""
        value = default if self.get(name) is None else self.get(name)
        for option in options:
            if type(value) is type(option) and value == option:
                return option
        raise UnsupportedError(f"{self.shown(name)} {value!r:.80} is not supported (kvgen reads: {_listed(options)})")

    def refuse(self, name: str, reason: str) -> None:
        """Raise UnsupportedError unless a field is absent, null, false or empty."""
        if self.get(name):
            raise UnsupportedError(f"{self.shown(name)} is set: {reason} is not supported")

    def size(self, name: str, default: int) -> int | None:
        """Return a whole number of at least 1; None for -1, which stands for all columns."""
        value = default if self.get(name) is None else self.get(name)
        if type(value) is not int or (value < 1 and value != -1):
            raise CheckpointError(f"{self.shown(name)} is {value!r:.80}; it must be a whole number above 0, or -1")
        return None if value == -1 else value

    def section(self, name: str) -> Settings:
        """Return a nested object. Raises CheckpointError if it is anything else."""
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.shown(name)} is {value!r:.80}; it must be an object")
        return Settings(value, self.path, f"{self.prefix}{name}.")

    def shown(self, name: str) -> str:
        """Return the file and the full name of a field, for messages."""
        return f"{self.path}: {self.prefix}{name:.80}"


def _listed(options: Sequence[object]) -> str:
    return ", ".join(map(str, options))
