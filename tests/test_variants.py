"""The kernels give the same bits on every kind of processor, operation by operation."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest

from kvgen.kernels.ffns import ACTIVATIONS
from kvgen.kernels.structs import OpKind
from tests.recorded import DECODERS, decode, make_decoder
from tests.recording import Part, Recorder, differences, noted_storages
from tests.variants import VARIANTS, emulated, program, runs_here

HERE = [name for name, variant in VARIANTS.items() if runs_here(variant)]
ELSEWHERE = [name for name, variant in VARIANTS.items() if emulated(variant)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@cache
def record(name: str, folder: Path) -> tuple[Path, Recorder]:
    """Let the library compute with a decoder; return the file with what it was given."""
    with noted_storages() as storages:
        decoder = make_decoder(DECODERS[name])
        recorder = Recorder(decoder, storages)
        decode(decoder)
    path = folder / f"{name}.recording"
    recorder.write(path)
    return path, recorder


def replay(name: str, folder: Path, command: tuple[str, ...], threads: int, expected: Path | None = None) -> Path:
    """Run a recording on a kind of processor; return the file with the results."""
    recording, _ = record(name, folder)
    results = recording.with_suffix(".results" if expected is None else ".others")
    given = () if expected is None else (str(expected),)
    subprocess.run([*command, str(recording), str(threads), str(results), *given], check=True)
    return results


@cache
def expected_results(name: str, folder: Path) -> Path:
    """What the first kind that this processor is of makes of a recording, on one thread."""
    if not HERE:
        pytest.skip("this processor is of no known kind")
    return replay(name, folder, program("replay.cpp", HERE[0]), threads=1)


def check(name: str, folder: Path, command: tuple[str, ...]) -> None:
    expected = expected_results(name, folder)
    found = replay(name, folder, command, threads=2, expected=expected)
    _, recorder = record(name, folder)
    assert differences(recorder.parts, found.read_bytes(), expected.read_bytes()) == {}


@pytest.mark.parametrize("name", DECODERS)
def test_a_replay_leaves_the_memory_that_the_library_leaves(name: str, folder: Path) -> None:
    """So the recordings are complete, and running one operation after another is what running all of them is."""
    results, at, left = expected_results(name, folder).read_bytes(), 0, []
    _, recorder = record(name, folder)
    for part in recorder.parts:
        if part.name == "memory":
            left.append(results[at : at + part.size])
        at += part.size
    assert left == recorder.left


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("variant", HERE)
def test_every_kind_of_this_processor_gives_the_same_bits(variant: str, name: str, folder: Path) -> None:
    check(name, folder, program("replay.cpp", variant))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("variant", ELSEWHERE)
def test_an_emulated_processor_gives_the_same_bits(variant: str, name: str, folder: Path) -> None:
    check(name, folder, program("replay.cpp", variant))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("variant", [*HERE, *ELSEWHERE])
def test_another_compiler_gives_the_same_bits(variant: str, name: str, folder: Path) -> None:
    check(name, folder, program("replay.cpp", variant, "clang++"))


def test_recordings_have_every_operation_on_every_kind_of_weight(folder: Path) -> None:
    found = {part.name for name in DECODERS for part in record(name, folder)[1].parts}
    kinds = {name.partition(" ")[0] for name in found} - {"memory"}
    assert kinds == {kind.name for kind in OpKind}
    assert {f"NORM {mode}" for mode in range(2)} <= found
    assert {f"ACTIVATE {mode}" for mode in {*ACTIVATIONS.values(), 5, 6, 7}} <= found  # xIELU, sigmoid, clamped SwiGLU
    grouped = {f"LINEAR {kind}, groups of {group}" for kind in ("INT4", "INT8") for group in (16, 32)}
    floats = {f"LINEAR {kind}" for kind in ("F32", "BF16", "F16")}
    assert {name for name in found if name.startswith("LINEAR")} == grouped | floats | {"LINEAR CODED4, groups of 32"}


def test_one_bit_is_a_difference() -> None:
    parts = [Part("NORM 0", 8), Part("ADD", 4), Part("memory", 5)]
    results = bytearray(17)
    assert differences(parts, results, bytes(17)) == {}
    results[4] = 1
    results[16] = 3
    assert differences(parts, results, bytes(17)) == {"NORM 0": "1 of 1, by 1 ulp", "memory": "1 of 1, by 3 ulp"}
