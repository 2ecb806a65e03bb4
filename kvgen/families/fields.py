"""Reading a checkpoint's metadata strictly: a missing or mistyped field is named, never guessed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvgen.errors import CheckpointError, UnsupportedError


class Fields:
    """The fields of `values`, which `path` holds. `prefix` stands before every name, in both."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def get(self, name: str) -> Any:
        """The value as it is; None if it is absent or null."""
        return self.values.get(self.prefix + name)

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1, and below 2^31: no size of a model is larger, and torch takes none of 2^63."""
        value = self._present(name, default)
        if type(value) is not int or value < 1:
            raise self._wrong(name, value, "a whole number of at least 1")
        if value >= 2**31:
            raise self._wrong(name, value, "below 2^31")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number greater than 0."""
        value = self._present(name, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self._wrong(name, value, "a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A number greater than 0, or None if it is absent or null."""
        return None if self.get(name) is None else self.number(name)

    def optional_count(self, name: str) -> int | None:
        """A whole number of at least 1, or None if it is absent or null."""
        return None if self.get(name) is None else self.count(name)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._present(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def section(self, name: str) -> Fields | None:
        """A nested object; None if it is absent, null or empty."""
        value = self.get(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return Fields(value, self.path)

    def require(self, name: str, supported: object) -> None:
        """Raise UnsupportedError unless the field is absent or has the one value that kvgen implements."""
        value = self.get(name)
        if value is not None and value != supported:
            raise UnsupportedError(f"{self.path}: {self.prefix}{name} is {value!r}; kvgen supports {supported!r}")

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.path}: {self.prefix}{name} is missing")
        return default

    def _wrong(self, name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.prefix}{name} is {value!r:.80}; it must be {wanted}")
