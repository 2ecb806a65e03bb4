"""The elementary functions of the kernels against float64, and with the same bits on every processor."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.variants import ELSEWHERE, HERE, program

# Of the other variants the simplest; those between are slow.
OTHERS = [*HERE[:0:-1][:1], *(pytest.param(name, marks=pytest.mark.slow) for name in (*HERE[1:-1], *ELSEWHERE))]
EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 2**-126, 1.0, -1.0, 3e38, -3e38, math.inf, -math.inf, math.nan]


class Function(NamedTuple):
    """exact: of float64 numbers. low, high: where the kernels come near it. ulp: how near at least, in units in the
    last place of the exact result. edges: results at the ends, and of what is no number."""

    exact: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    low: float
    high: float
    ulp: float
    edges: Mapping[float, float]


def erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = torch.erf(torch.from_numpy(x)).numpy()
    return found


ODD = {0.0: 0, math.inf: 1, -math.inf: -1, 3e38: 1, math.nan: math.nan}
FUNCTIONS = {
    "exp": Function(np.exp, -87.3, 88.3, 1, {0.0: 1, -88.0: 0, -3e38: 0, -math.inf: 0}),
    "exp2": Function(
        np.exp2, -126, 127, 2.25, {0.0: 1, -3.0: 0.125, -127.0: 0, -3e38: 0, -math.inf: 0, math.nan: math.nan}
    ),
    "expm1": Function(np.expm1, -87.3, 88.3, 1.5, {0.0: 0, -3e38: -1, -math.inf: -1, math.nan: math.nan}),
    "log1p": Function(np.log1p, 0, 1, 2, {0.0: 0, math.nan: math.nan}),
    "tanh": Function(np.tanh, -100, 100, 1.25, ODD),
    "erf": Function(erf, -100, 100, 1.25, ODD),
    "sigmoid": Function(lambda x: 1 / (1 + np.exp(-x)), -87, 100, 2.5, {0.0: 0.5, math.inf: 1, math.nan: math.nan}),
}


def apply(name: str, variant: str, numbers: NDArray[np.float32], folder: Path) -> NDArray[np.float32]:
    padded = np.zeros(-(-len(numbers) // 16) * 16, np.float32)
    padded[: len(numbers)] = numbers
    (folder / "numbers").write_bytes(padded.tobytes())
    command = [*program("functions.cpp", variant), name, str(folder / "numbers"), str(folder / "results")]
    subprocess.run(command, check=True)
    return np.fromfile(folder / "results", np.float32)[: len(numbers)]


def numbers_in(low: float, high: float) -> NDArray[np.float32]:
    """Evenly spaced numbers, and as many of every magnitude down to the smallest."""
    even = np.linspace(low, high, 200_000)
    small = np.geomspace(2**-149, max(-low, high), 200_000)
    numbers = np.concatenate((even, small, -small)).astype(np.float32)
    return numbers[(numbers > low) & (numbers < high)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_exact_to_the_last_places(name: str, tmp_path: Path) -> None:
    function, variant = FUNCTIONS[name], HERE[0]
    numbers = numbers_in(function.low, function.high)
    exact = function.exact(numbers.astype(np.float64))
    error = np.abs(apply(name, variant, numbers, tmp_path) - exact) / np.spacing(np.abs(exact).astype(np.float32))
    worst = error.argmax()
    assert error[worst] <= function.ulp, f"{name}({numbers[worst]!r}) is off by {error[worst]:.2f} ulp"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_edges(name: str, tmp_path: Path) -> None:
    edges = FUNCTIONS[name].edges
    found = apply(name, HERE[0], np.array(list(edges), np.float32), tmp_path)
    expected = np.array(list(edges.values()), np.float32)
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_zero_keeps_its_sign(name: str, tmp_path: Path) -> None:
    zeros = np.array([0.0, -0.0], np.float32)
    assert np.signbit(apply(name, HERE[0], zeros, tmp_path)).tolist() == [False, True]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("variant", OTHERS)
def test_every_variant_gives_the_same_bits(name: str, variant: str, tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 400_000, np.uint32).view(np.float32)
    numbers = np.concatenate((np.array(EDGES, np.float32), numbers_in(-100, 100), bits))
    expected, found = (apply(name, kind, numbers, tmp_path) for kind in (HERE[0], variant))
    same = found.view(np.uint32) == expected.view(np.uint32)
    differ = np.flatnonzero(~(same | np.isnan(found) & np.isnan(expected)))  # processors give NaN different signs
    assert differ.size == 0, f"{name}({numbers[differ[0]]!r}) is {found[differ[0]]!r}, not {expected[differ[0]]!r}"
