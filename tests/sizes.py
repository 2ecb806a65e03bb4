"""How much of a long list of cases the fast tests take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import settings


def first(count: int, values: Iterable[Any]) -> Iterator[Any]:
    """Yield the values for `pytest.mark.parametrize`: after the first `count`, only where slow tests run."""
    for index, value in enumerate(values):
        yield value if index < count else pytest.param(value, marks=pytest.mark.slow)


def examples(count: int) -> int:
    """Return how many of `count` examples Hypothesis tries: all where slow tests run, else a fifth."""
    return count if settings.get_current_profile_name() == "slow" else max(count // 5, 12)
