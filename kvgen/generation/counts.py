"""Counts that not every model tells."""

from __future__ import annotations

from collections.abc import Iterable


def total(counts: Iterable[int | None]) -> int | None:
    """Their sum; None if one of them is unknown."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)
