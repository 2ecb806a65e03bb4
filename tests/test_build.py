"""Which kernels a processor gets, and where they come from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kvgen
from kvgen.kernels import build, compiler, processors
from kvgen.kernels.processors import VARIANTS, Variant, chosen_variant
from tests.program import run

V3 = ["avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt"]
V4 = [*V3, "avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"]


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, capabilities: list[str]) -> None:
    """Be another processor."""
    monkeypatch.setattr(processors.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))


@pytest.fixture
def compiled() -> Path:
    """The library of this processor's variant, as the tests' own kernels are compiled."""
    path = build._compiled(chosen_variant())
    assert path.exists()
    return path


@pytest.fixture
def copying_compiler(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quick compiler, and an empty cache folder for what it makes."""
    path = tmp_path / "c++"
    path.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{compiled}" "$last"\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("KVGEN_CACHE_DIR", str(tmp_path / "cache"))
    return path


# --- Which ---


@pytest.mark.parametrize(
    ("machine", "capabilities", "chosen"),
    [
        ("x86_64", [*V4, "avx512_vnni", "amx_tile", "amx_int8"], "amx"),
        ("x86_64", [*V4, "avx512_vnni", "avx_vnni", "amx_tile"], "avx512-vnni"),
        ("x86_64", V4, "avx512"),
        ("x86_64", [*V3, "avx_vnni", "avx512_f", "avx512_vnni"], "avx-vnni"),
        ("AMD64", V3, "avx2"),
        ("aarch64", ["neon", "dot"], "neon"),
        ("arm64", ["neon", "dot", "i8mm"], "neon"),
    ],
)
def test_a_processor_gets_the_best_that_it_has(
    machine: str, capabilities: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVGEN_CPU", raising=False)
    pretend(monkeypatch, machine, capabilities)
    assert chosen_variant().name == chosen
    monkeypatch.setenv("KVGEN_CPU", "native")
    assert chosen_variant().name == chosen


@pytest.mark.parametrize(
    ("machine", "capabilities", "reason"),
    [
        ("x86_64", V3[1:], "this processor lacks avx2, which the kernels need"),
        ("aarch64", ["neon"], "this processor lacks dot, which the kernels need"),
        ("riscv64", [], "there are no kernels for riscv64 processors"),
    ],
)
def test_a_processor_without_any_runs_on_torch(
    machine: str, capabilities: list[str], reason: str, tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVGEN_CPU", raising=False)
    pretend(monkeypatch, machine, capabilities)
    folder, _ = tiny_llama()
    assert kvgen.load(folder).model.engine == f"torch ({reason})"
    with pytest.raises(kvgen.UnsupportedError, match=reason):
        kvgen.load(folder, kernels="cpp")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_that_is_named_is_used(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, variant.machine, [*V4, "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8", "neon", "dot"])
    monkeypatch.setenv("KVGEN_CPU", variant.name)
    assert chosen_variant() == variant
    for name in variant.needs:
        pretend(monkeypatch, variant.machine, [other for other in variant.needs if other != name])
        with pytest.raises(kvgen.UnsupportedError, match=f"^KVGEN_CPU is '{variant.name}', but .* lacks {name}$"):
            chosen_variant()


def test_a_name_that_cannot_be_is_refused_in_a_line(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = tiny_llama()
    for command in (["generate", "--ids", "-p", "1 2 3", "-m"], ["inspect"]):
        refused = run(*command, str(folder), env=os.environ | {"KVGEN_CPU": "avx"})
        names = "native, amx, avx512-vnni, avx512, avx-vnni, avx2, neon"
        assert refused.stderr == f"kvgen: error: KVGEN_CPU is 'avx', which is not one of {names}\n"
        assert refused.returncode == 2
    foreign = next(variant for variant in VARIANTS if variant.machine != processors.machine())
    why = f"this processor is {processors.machine()}, not {foreign.machine}"
    for command in (["generate", "--ids", "-p", "1 2 3", "-m"], ["inspect"]):  # although `auto` could run on torch
        refused = run(*command, str(folder), env=os.environ | {"KVGEN_CPU": foreign.name})
        assert refused.stderr == f"kvgen: error: KVGEN_CPU is '{foreign.name}', but {why}\n"
        assert refused.returncode == 1


def test_stats_and_inspect_name_the_variant(tiny_llama) -> None:
    folder, _ = tiny_llama()
    engine = chosen_variant().engine
    shown = run("generate", "-m", str(folder), "--ids", "-p", "1 2 3", "-n", "2", "--stats")
    assert shown.stderr.endswith(f", {engine}\n")
    assert f"on a CPU       {engine}\n" in run("inspect", str(folder)).stdout
    assert f'"cpu_engine": "{engine}"' in run("inspect", str(folder), "--json").stdout


# --- Where from ---


def test_a_prebuilt_library_of_this_source_needs_no_compiler(
    compiled: Path, tmp_path: Path, tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, folder = chosen_variant(), tiny_llama()[0]
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._load.cache_clear()
    with pytest.raises(kvgen.UnsupportedError, match="no C\\+\\+ compiler"):
        build.library()
    shutil.copy(compiled, tmp_path / compiler.library_name(variant))
    assert build.available_variant() == variant
    assert kvgen.load(folder, kernels="cpp").model.engine == variant.engine
    build._load.cache_clear()  # of this folder


def test_an_old_compiler_gets_the_best_variant_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, second = [variant for variant in processors.machine_variants() if not variant.lacking()][:2]
    new = next(flag for flag in best.flags if flag not in second.flags)
    old = tmp_path / "old-compiler"
    old.write_text(f'#!/bin/sh\ncase " $* " in *" {new} "*) exit 1;; esac\nexec {compiler.find_compiler()} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setenv("KVGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("KVGEN_CPU", raising=False)
    assert build.available_variant() == second
    monkeypatch.setenv("KVGEN_CPU", best.name)
    assert build.available_variant() == best


def test_a_library_of_another_source_or_compiler_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> set[str]:
        return {compiler.library_name(variant) for variant in VARIANTS}

    kernels, before = compiler._SOURCE.parent, names()
    assert len(before) == len(VARIANTS)
    for file in (kernels / "kernels.cpp", *kernels.glob("*.h")):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(compiler, "_SOURCE", tmp_path / "kernels.cpp")
    assert names() == before
    for file in sorted(tmp_path.iterdir()):
        file.write_text(file.read_text() + "\n")
        assert not names() & before, file.name
        before |= names()
    tool = tmp_path / "c++"
    for content in ("", "x"):
        tool.write_text(content)
        name = compiler.library_name(VARIANTS[0], str(tool))
        assert name not in before
        before.add(name)


@pytest.mark.slow
def test_two_processes_compile_a_library_once(copying_compiler: Path, tmp_path: Path) -> None:
    """Lines of `events`: a process asks for the lock, or the compiler runs, which ends when `gate` has had a writer."""
    for name in ("events", "gate"):
        os.mkfifo(tmp_path / name)
    start, *rest = copying_compiler.read_text().splitlines(keepends=True)
    asked = 'case " $* " in *" -E "*) exit 0;; esac'  # which flags it knows
    waiting = f"{asked}\necho compiles > {tmp_path}/events\ncat {tmp_path}/gate\n"
    copying_compiler.write_text("".join((start, waiting, *rest)))
    code = f"""
from pathlib import Path
from kvgen.kernels import build
class Lock(build.FileLock):
    def acquire(self, *args, **options):
        Path("{tmp_path}/events").write_text("locks\\n")
        return super().acquire(*args, **options)
build.FileLock = Lock
build.library()
"""
    with os.fdopen(os.open(tmp_path / "events", os.O_RDWR)) as events:
        processes = [subprocess.Popen([sys.executable, "-c", code])]
        assert [events.readline(), events.readline()] == ["locks\n", "compiles\n"]
        processes.append(subprocess.Popen([sys.executable, "-c", code]))
        assert events.readline() == "locks\n"
        (tmp_path / "gate").write_text("")
        assert [process.wait(60) for process in processes] == [0, 0]


def test_what_was_not_loaded_for_a_month_is_swept(copying_compiler: Path, tmp_path: Path) -> None:
    folder, day = tmp_path / "cache" / "kernels", 24 * 3600
    folder.mkdir(parents=True)
    (folder / "tmp-left-behind").mkdir()
    for name in ("other-version", "old", "old-format.so", "tmp-left-behind/half.so"):
        (folder / name).write_text("")
    for name, days in (("other-version", 29), ("old", 31), ("old-format.so", 400), ("tmp-left-behind", 0.1)):
        os.utime(folder / name, (time.time() - days * day,) * 2)
    made = build._compiled(chosen_variant())
    assert sorted(folder.iterdir()) == sorted([made, folder / "other-version"])
    os.utime(made, (0, 0))
    assert build._compiled(chosen_variant()) == made
    assert time.time() - made.stat().st_mtime < day


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++")
@pytest.mark.parametrize(
    "variant", [each for each in VARIANTS if each.machine == processors.machine()], ids=lambda variant: variant.name
)
def test_clang_makes_kernels_with_the_same_bits(
    variant: Variant, smollm2: kvgen.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the compiler that the tests use otherwise, for the processor's best variant."""
    if lacking := variant.lacking():
        pytest.skip(f"this processor {lacking}")
    ids = torch.tensor([smollm2.tokenizer.encode("Once upon a time, in a land far away,")])
    expected = smollm2.model.all_logits(ids)
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setenv("KVGEN_CPU", variant.name)
    monkeypatch.setenv("KVGEN_CACHE_DIR", str(tmp_path))
    build._load.cache_clear()
    try:
        loaded = kvgen.load(smollm2.source, kernels="cpp")
        assert loaded.model.engine == variant.engine
        assert torch.equal(loaded.model.all_logits(ids), expected)
    finally:
        build._load.cache_clear()
