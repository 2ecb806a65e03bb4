"""Wheels: kernels for every processor of the platform, built by setup.py, and run where there is no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvgen.kernels.compiler import library_name
from kvgen.kernels.processors import chosen_variant, machine_variants

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a wheel is built from, in a folder of its own."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "kvgen", folder / "kvgen", ignore=shutil.ignore_patterns("__pycache__", "libraries"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def quick_compiler(tmp_path: Path) -> Path:
    """Writes its flags into what it makes, and into `calls`."""
    path = tmp_path / "c++"
    path.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$@" | tee -a "{tmp_path}/calls" > "$last"\n')
    path.chmod(0o755)
    return path


def build(checkout: Path, kind: str = "wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    """Do as pip does. The wheel comes into `dist`."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    variables = {name: value for name, value in os.environ.items() if name != "KVGEN_PURE"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=checkout, env=variables, capture_output=True, text=True)


def test_a_wheel_has_the_kernels_of_all_processors_of_its_platform(checkout: Path, quick_compiler: Path) -> None:
    done = build(checkout, CXX=str(quick_compiler))
    assert done.returncode == 0, done.stderr
    [wheel] = (checkout / "dist").iterdir()
    assert re.fullmatch(r"kvgen-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        flags = {
            name.rpartition("/")[2]: archive.read(name).decode().split()
            for name in archive.namelist()
            if "/libraries/" in name
        }
        assert {"kvgen/kernels/kernels.cpp", "kvgen/kernels/linear.h"} <= set(archive.namelist())  # for the digest
    assert flags.keys() == {library_name(variant) for variant in machine_variants()}
    for variant in machine_variants():
        assert {*variant.flags, "-ffp-contract=off"} <= set(flags[library_name(variant)])


def test_without_a_compiler_a_wheel_says_what_to_do(checkout: Path) -> None:
    refused = build(checkout, CXX="no-such-compiler")
    assert refused.returncode == 1
    reason = "no C++ compiler found ($CXX, g++, clang++ or c++)"
    assert refused.stderr.splitlines()[-1] == f"error: {reason}; KVGEN_PURE=1 makes a wheel without compiled kernels"
    assert build(checkout, CXX="no-such-compiler", KVGEN_PURE="1").returncode == 0
    [wheel] = (checkout / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "libraries" in name]


def test_a_checkout_is_installed_without_compiling(checkout: Path, quick_compiler: Path) -> None:
    for compiler in (quick_compiler, "no-such-compiler"):
        done = build(checkout, "editable", CXX=str(compiler))
        assert done.returncode == 0, done.stderr
        assert "no C++ compiler" not in done.stderr  # setuptools only warns of what fails here
    assert not (quick_compiler.parent / "calls").exists()


@pytest.mark.slow
def test_a_wheel_runs_on_kernels_where_there_is_no_compiler(smollm2_path: Path, checkout: Path, tmp_path: Path) -> None:
    """The README's first examples; dependencies are those of the tests."""
    assert build(checkout).returncode == 0
    [wheel] = (checkout / "dist").iterdir()
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    environment = {"PYTHONPATH": str(installed), "PATH": "", "HOME": str(tmp_path)}
    environment |= {"KVGEN_CACHE_DIR": str(tmp_path / "cache"), "KVGEN_MODEL": str(smollm2_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvgen", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    shown = (ROOT / "README.md").read_text()
    story = run("generate", "Once upon a time,", "-t", "0", "--max-tokens", "24", "--stats", "--kernels", "cpp")
    assert story.stderr.endswith(f", {chosen_variant().engine}\n")
    assert f"--max-tokens 24\n{story.stdout}```" in shown
    answer = run("generate", "--chat", "-p", "What is the capital of Japan?", "-t", "0")
    assert f"-t 0\n{answer.stdout}```" in shown
    assert not (tmp_path / "cache" / "kernels").exists()
    for variant in machine_variants():
        if not variant.lacking():
            environment["KVGEN_CPU"] = variant.name
            named = run("generate", "Once upon a time,", "-t", "0", "--max-tokens", "24", "--stats")
            assert named.stderr.endswith(f", {variant.engine}\n")
            assert named.stdout == story.stdout
