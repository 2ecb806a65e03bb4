"""The kernels give the same bits on every variant, operation by operation."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import kvgen
from kvgen.checkpoint import gguf_blocks
from kvgen.kernels.ffns import ACTIVATIONS
from kvgen.kernels.packed import PackedMatrix
from kvgen.kernels.structs import OpKind
from tests.conftest import CORPUS
from tests.recorded import DECODERS, decode, make_decoder
from tests.recording import Part, Recorder, differences, noted_storages
from tests.variants import ELSEWHERE, HERE, replayer

# The best and the simplest variant for this processor; those between, which take as long to compile, are slow.
ENDS = [name if name in HERE[:: len(HERE) - 1 or 1] else pytest.param(name, marks=pytest.mark.slow) for name in HERE]
LOGITS = """
import hashlib, sys, torch, kvgen
torch.set_num_threads(2)
model = kvgen.load(sys.argv[1], kv_dtype=sys.argv[2]).model
ids = torch.tensor([[int(number) for number in sys.argv[3:]]])
digest, cache = hashlib.sha256(), None
for length in (*range(ids.shape[1] - 4, ids.shape[1]), ids.shape[1]):
    logits, cache = model(ids[:, :length], cache)
    digest.update(logits.numpy().tobytes())
digest.update(model.all_logits(ids).numpy().tobytes())
print(model.engine, digest.hexdigest())
"""


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
    """Run a recording on a variant; return the file with the results."""
    recording, _ = record(name, folder)
    results = recording.with_suffix(".results" if expected is None else ".others")
    given = () if expected is None else (str(expected),)
    subprocess.run([*command, str(recording), str(threads), str(results), *given], check=True)
    return results


@cache
def expected_results(name: str, folder: Path) -> Path:
    """What the best variant for this processor makes of a recording, on one thread."""
    return replay(name, folder, replayer(HERE[0]), threads=1)


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
@pytest.mark.parametrize("variant", ENDS)
def test_every_variant_for_this_processor_gives_the_same_bits(variant: str, name: str, folder: Path) -> None:
    check(name, folder, replayer(variant))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("variant", ELSEWHERE)
def test_an_emulated_processor_gives_the_same_bits(variant: str, name: str, folder: Path) -> None:
    check(name, folder, replayer(variant))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("variant", [*HERE, *ELSEWHERE])
def test_another_compiler_gives_the_same_bits(variant: str, name: str, folder: Path) -> None:
    check(name, folder, replayer(variant, "clang++"))


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["auto", "bfloat16", "int8"])
def test_the_default_model_gives_the_same_logits_on_every_variant(smollm2: kvgen.Loaded, stored: str) -> None:
    """And whatever instructions torch uses, which computes rotations."""
    ids = [str(number) for number in smollm2.tokenizer.encode("\n".join(CORPUS))]
    command = [sys.executable, "-c", LOGITS, str(smollm2.source), stored, *ids]
    found = {}
    for name in HERE:
        for capability in ("default", "avx2"):
            environment = os.environ | {"KVGEN_CPU": name, "ATEN_CPU_CAPABILITY": capability}
            shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            engine, _, digest = shown.rpartition(" ")
            assert engine == f"C++ kernels ({name})"
            found[name, capability] = digest
    assert len(set(found.values())) == 1, found


def test_recordings_have_every_operation_on_every_kind_of_weight(folder: Path) -> None:
    found = {part.name for name in DECODERS for part in record(name, folder)[1].parts}
    kinds = {name.partition(" ")[0] for name in found} - {"memory"}
    assert kinds == {kind.name for kind in OpKind}
    assert {f"NORM {mode}" for mode in range(2)} <= found
    assert {f"ACTIVATE {mode}" for mode in {*ACTIVATIONS.values(), 5, 6, 7}} <= found  # xIELU, sigmoid, clamped SwiGLU
    grouped = {f"LINEAR {kind}, groups of {group}" for kind in ("INT4", "INT8") for group in (16, 32)}
    floats = {f"LINEAR {kind}" for kind in ("F32", "BF16", "F16")}
    coded = {f"LINEAR {kind}, groups of 32" for kind in ("CODED4", "INT5")}
    assert {name for name in found if name.startswith("LINEAR")} == grouped | floats | coded


@pytest.mark.parametrize("stored", ["Q5_0", "Q5_1", "Q5_K"])
def test_codes_of_5_bits_take_5_and_change_no_bit(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = []
    for bits in (5, 8):
        decoder = make_decoder(DECODERS[stored])
        matrix = decoder.weights["token_embd.weight"]
        assert isinstance(matrix, PackedMatrix)
        assert matrix.tensors[0].nbytes * 8 == matrix.shape[0] * matrix.shape[1] * bits  # rows are whole panels
        ids = torch.arange(70)[None]
        prompt, cache = decoder.forward(ids[:, :-1], None)
        logits.append((prompt, decoder.forward(ids, cache)[0]))
        monkeypatch.setattr(gguf_blocks, "_LOWEST", {})
    assert all(torch.equal(five, eight) for five, eight in zip(*logits, strict=True))


def test_one_bit_is_a_difference() -> None:
    parts = [Part("NORM 0", 8), Part("ADD", 4), Part("memory", 5)]
    results = bytearray(17)
    assert differences(parts, results, bytes(17)) == {}
    results[4] = 1
    results[16] = 3
    assert differences(parts, results, bytes(17)) == {"NORM 0": "1 of 1, by 1 ulp", "memory": "1 of 1, by 3 ulp"}
