"""A strict reader of metadata: missing or mistyped fields raise an error that names them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvgen.errors import CheckpointError, UnsupportedError


class Fields:
    """The fields in `values`, read from the file `path`. `prefix` is prepended to every name."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix

    def get(self, name: str) -> Any:
        """Return the raw value; None if it is absent or null."""
        return self.values.get(self.prefix + name)

    def count(self, name: str, default: int | None = None) -> int:
        """Return a whole number from 1 to 2^31 - 1; larger sizes overflow in torch."""
        value = self._get_or(name, default)
        if type(value) is not int or value < 1:
            raise self._wrong(name, value, "a whole number of at least 1")
        if value >= 2**31:
            raise self._wrong(name, value, "below 2^31")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """Return `count(name)`, or 0."""
        value = self._get_or(name, default)
        return 0 if type(value) is int and value == 0 else self.count(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        value = self._get_or(name, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self._wrong(name, value, "a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Return `number(name)`, or None if it is absent or null."""
        return None if self.get(name) is None else self.number(name)

    def optional_count(self, name: str) -> int | None:
        """Return `count(name)`, or None if it is absent or null."""
        return None if self.get(name) is None else self.count(name)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get_or(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def section(self, name: str) -> Fields | None:
        """Return a nested object; None if it is absent, null or empty."""
        value = self.get(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return Fields(value, self.path)

    def require(self, name: str, supported: object) -> None:
        """Raise UnsupportedError unless the field is absent, null or equal to `supported`."""
        value = self.get(name)
        if value is not None and value != supported:
            raise UnsupportedError(f"{self.path}: {self.prefix}{name} is {value!r}; kvgen supports {supported!r}")

    def _get_or(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.path}: {self.prefix}{name} is missing")
        return default if value is None else value

    def _wrong(self, name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.prefix}{name} is {value!r:.80}; it must be {wanted}")
