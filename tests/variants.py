"""Each variant of `kvgen.kernels.processors`, compiled once: as a library, or in a program, run here or emulated."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import MappingProxyType

import pytest
from filelock import FileLock

from kvgen.kernels import build
from kvgen.kernels.compiler import _FLAGS, _SOURCE, find_compiler
from kvgen.kernels.processors import VARIANTS, Variant, machine
from kvgen.system import cache_dir

HERE = [variant.name for variant in VARIANTS if not variant.lacking()]
ELSEWHERE = [variant.name for variant in VARIANTS if variant.machine == "arm64" != machine()]
_SYSROOT = "/usr/aarch64-linux-gnu"
_CROSS = MappingProxyType({"g++": ("aarch64-linux-gnu-g++",), "clang++": ("clang++", "--target=aarch64-linux-gnu")})


@cache
def program(source: str, name: str, compiler: str = "g++") -> tuple[str, ...]:
    """Compile a program of tests/ for a variant, and return the command that runs it; or skip the test."""
    command, runner = _tools(name, compiler)
    flags = (flag for flag in _FLAGS if flag != "-shared")
    more = (*flags, *_variant(name).flags, "-w", f"-I{_SOURCE.parent}", "-ldl")
    return *runner, str(_compiled(Path(__file__).with_name(source), command, more))


@cache
def replayer(name: str, compiler: str = "g++") -> tuple[str, ...]:
    """Compile a variant, and return the command that replays recordings on it; or skip the test.

    What kvgen itself compiles, or has compiled, is not compiled again.
    """
    command, _ = _tools(name, compiler)
    variant = _variant(name)
    simplest = [other.name for other in VARIANTS if other.machine == variant.machine][-1]
    if name in HERE and shutil.which(compiler) == find_compiler():
        library = build._compiled(variant)
    else:
        library = _compiled(_SOURCE, command, (*_FLAGS, *variant.flags, "-w"))
    return *program("replay.cpp", simplest, compiler), str(library)


def _variant(name: str) -> Variant:
    return next(variant for variant in VARIANTS if variant.name == name)


def _tools(name: str, compiler: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The command that compiles for a variant, and what runs the result; or skip the test."""
    command: tuple[str, ...] = (compiler,)
    runner: tuple[str, ...] = ()
    if name in ELSEWHERE:
        command, runner = _CROSS[compiler], ("qemu-aarch64", "-L", _SYSROOT)
        if not Path(_SYSROOT).is_dir():
            pytest.skip(f"there are no libraries for {_variant(name).machine} in {_SYSROOT}")
    for tool in (command[0], *runner[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    return command, runner


def _compiled(source: Path, command: tuple[str, ...], flags: tuple[str, ...]) -> Path:
    """Compile into kvgen's cache folder, unless the result is there; processes that need the same one wait."""
    digest = hashlib.sha256("\0".join((str(source.resolve()), *command, *flags)).encode())
    name = f"{source.stem}-{digest.hexdigest()[:8]}"
    for file in (source, _SOURCE, *sorted(_SOURCE.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    folder = cache_dir() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{digest.hexdigest()[:16]}"
    with FileLock(folder / f"{name}.lock"):
        if not path.exists():
            for old in folder.glob(f"{name}-*"):
                old.unlink()
            built = folder / f"{name}.new"
            subprocess.run([*command, str(source), *flags, "-o", str(built)], check=True)
            built.replace(path)
    return path
