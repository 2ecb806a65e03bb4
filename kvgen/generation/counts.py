"""Sums of counts that may be unknown."""

from __future__ import annotations

from collections.abc import Iterable


def total(counts: Iterable[int | None]) -> int | None:
    """Return the sum; None if any count is unknown."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)
