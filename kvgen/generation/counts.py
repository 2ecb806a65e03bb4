"""Numbers that may be unknown or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable


def total(counts: Iterable[int | None]) -> int | None:
    """Return the sum; None if any count is unknown."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def finite(value: float | None) -> float | None:
    """Return the number; None if it is infinite, NaN or None: JSON has none of these."""
    return None if value is None or not math.isfinite(value) else value
