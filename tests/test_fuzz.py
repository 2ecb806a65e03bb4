"""A few thousand mutations of what strangers can hand to kvgen; `make fuzz` makes many more."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS, refuses_or_reads
from tests.sizes import examples


@pytest.mark.parametrize("name", TARGETS)
def test_the_first_seed_is_read_as_far_as_it_goes(name: str) -> None:
    """Else the mutations would all die at the door."""
    target, seeds = TARGETS[name]
    read = refuses_or_reads(target, seeds[0])
    assert read or name == "gguf"  # it lacks tensors of a decoder


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=examples(150))
def test_mutations_are_read_or_refused_in_time(name: str, data: st.DataObject) -> None:
    target, seeds = TARGETS[name]
    mutated = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated)))
        piece = data.draw(st.binary(max_size=12))
        mutated[at : at + data.draw(st.integers(0, 12))] = piece
    start = time.perf_counter()
    refuses_or_reads(target, bytes(mutated))
    assert time.perf_counter() - start < 10  # 5 seconds is the limit; the machine may be busy


@pytest.mark.parametrize("name", TARGETS)
def test_noise_is_refused(name: str) -> None:
    target, _ = TARGETS[name]
    noise = random.Random(0)
    for size in (0, 1, 7, 8, 100, 5000):
        refuses_or_reads(target, noise.randbytes(size))
