"""What a template that nobody vouches for may cost: how much it may make, and what its operations would make.

A clock can end a loop, but not a single operation of Python, and memory is gone before any clock looks. So all that a
template makes is counted, and an operation whose result can be far larger than its operands is estimated beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jinja2.exceptions import SecurityError

MAX_CHARACTERS = 10_000_000
"""Of the text that comes out."""

_MAX_MADE = 10 * MAX_CHARACTERS  # characters and items of all values on the way there
_MAX_COMPARED = 1_000_000_000  # characters, by a search that looks at each pair
_MAX_BITS = 4096  # of a number
_ITEM = 10  # characters that an item of a list counts as
_MAX_LAYOUT = 16  # of what `tojson` puts between items
_STAR = re.compile(r"%[-+ #0.\d]*\*")
_NESTED = re.compile(r"\{[^{}]*:[^{}]*\{")
_PAIRWISE = frozenset({"strip", "lstrip", "rstrip", "trim", "rfind", "rindex", "rsplit", "rpartition"})
_TEXT = (str, bytes)
_Value = TypeVar("_Value")


class Budget:
    """How much a template may still make in one rendering."""

    def __init__(self) -> None:
        self._left = _MAX_MADE

    def renew(self) -> None:
        """Start another rendering."""
        self._left = _MAX_MADE

    def made(self, value: _Value) -> _Value:
        """`value`, which was just made and is counted."""
        if isinstance(value, (*_TEXT, list, tuple, dict)):
            self._left -= len(value)
            self.affords(0)
            # What is listed twice is kept once, but written, compared and hashed twice.
            if not isinstance(value, _TEXT) and _weight(value) > MAX_CHARACTERS:
                raise SecurityError("a value is too large")
        return value

    def affords(self, size: int) -> None:
        """Raises SecurityError if so many characters or items more are too many."""
        if size > self._left:
            raise SecurityError("it makes too much text and data")

    def allows_operator(self, operator: str, left: Any, right: Any) -> None:
        """Raises SecurityError if `left operator right` would be too large."""
        sizes = [len(side) for side in (left, right) if isinstance(side, (*_TEXT, list, tuple))]
        numbers = [abs(side) for side in (left, right) if isinstance(side, int)]
        if operator == "*" and sizes and numbers:
            self.affords(sizes[0] * numbers[0])
        elif operator in ("*", "**") and len(numbers) == 2:
            bits, times = numbers[0].bit_length(), numbers[1]
            if (bits + times.bit_length() if operator == "*" else bits * times) > _MAX_BITS:
                raise SecurityError("a number is too large")
        elif operator == "%" and isinstance(left, _TEXT):
            self.allows_format(left)
        elif operator == "+":
            self.affords(sum(sizes))

    def allows_format(self, layout: Any) -> None:
        """Raises SecurityError if a format, of either style, pads to absurd widths or to widths that it is handed."""
        text = layout.decode("latin-1") if isinstance(layout, bytes) else str(layout)
        if _STAR.search(text) or _NESTED.search(text):
            raise SecurityError("a format takes its width from a value")
        if any(len(digits) > 8 for digits in re.findall(r"\d+", text)):
            raise SecurityError("a format is too wide")
        self.affords(sum(map(int, re.findall(r"\d+", text))))

    def allows_call(self, name: str, value: Any, arguments: Iterable[Any], options: Mapping[str, Any]) -> None:
        """Raises SecurityError if the filter `name` of `value`, or its method, would be too much."""
        given = [*arguments, *options.values()]
        if any(isinstance(number, int) and abs(number) > MAX_CHARACTERS for number in given):
            raise SecurityError(f"a number that is handed to {name or 'a function'} is too large")
        lengths = [len(text) for text in given if isinstance(text, _TEXT)]
        if name == "translate":
            raise SecurityError("translate is not for templates")
        if name == "sum" and any(isinstance(start, (list, tuple)) for start in given):
            raise SecurityError("sum is for numbers")  # a list is copied for each item
        if name in ("format", "format_map"):
            self.allows_format(value)
        if not isinstance(value, _TEXT):
            return
        if name in _PAIRWISE and len(value) * max(lengths, default=0) > _MAX_COMPARED:
            raise SecurityError(f"{name} takes too long")
        if name == "replace" and len(given) >= 2:
            old = options["old"] if "old" in options else given[0]
            times = len(value) + 1
            if isinstance(value, str) and isinstance(old, str):
                times = value.count(old)
            self.affords(times * max(lengths, default=0))
        if name in ("indent", "expandtabs"):
            lines = sum(value.count(mark) for mark in ("\n", "\r", "\t")) + 1 if isinstance(value, str) else len(value)
            widths = [number for number in given if isinstance(number, int)]
            self.affords(lines * max([*widths, *lengths, 8]))

    def allows_join(self, separator: Any, items: list[Any]) -> None:
        """Raises SecurityError if the text of the items, with the separator between them, is too long."""
        self.affords(_weight(items) + len(items) * (len(separator) if isinstance(separator, _TEXT) else 1))


def allows_layout(indent: Any, separators: Any) -> None:
    """Raises SecurityError for indentation and separators that nobody would read."""
    between = [indent] if separators is None else [indent, *separators]
    for value in between:
        if (value if isinstance(value, int) else len(value or "")) > _MAX_LAYOUT:
            raise SecurityError("tojson is given too wide a layout")


def _weight(value: Any) -> int:
    """Characters of a value, each as often as it would be written; not further than to what is too many."""
    total, left = 0, [value]
    while left and total <= MAX_CHARACTERS:
        item = left.pop()
        if isinstance(item, _TEXT):
            total += len(item)
        elif isinstance(item, dict):
            total += _ITEM * len(item)
            left += item.keys()
            left += item.values()
        elif isinstance(item, (list, tuple)):
            total += _ITEM * len(item)
            left += item
    return total
