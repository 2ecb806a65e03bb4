"""Programs of the kernels for each variant of `kvgen.kernels.processors`: compiled once, run here or emulated."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import MappingProxyType

import pytest
from filelock import FileLock

from kvgen.kernels.compiler import _FLAGS, _SOURCE
from kvgen.kernels.processors import VARIANTS, machine
from kvgen.system import cache_dir

HERE = [variant.name for variant in VARIANTS if not variant.lacking()]
ELSEWHERE = [variant.name for variant in VARIANTS if variant.machine == "arm64" != machine()]
_SYSROOT = "/usr/aarch64-linux-gnu"
_CROSS = MappingProxyType({"g++": ("aarch64-linux-gnu-g++",), "clang++": ("clang++", "--target=aarch64-linux-gnu")})


@cache
def program(source: str, name: str, compiler: str = "g++") -> tuple[str, ...]:
    """Compile a program of tests/ for a variant, and return the command that runs it; or skip the test."""
    variant = next(variant for variant in VARIANTS if variant.name == name)
    command: tuple[str, ...] = (compiler,)
    runner: tuple[str, ...] = ()
    if name in ELSEWHERE:
        command, runner = _CROSS[compiler], ("qemu-aarch64", "-L", _SYSROOT)
        if not Path(_SYSROOT).is_dir():
            pytest.skip(f"there are no libraries for {variant.machine} in {_SYSROOT}")
    for tool in (command[0], *runner[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    flags = (flag for flag in _FLAGS if flag != "-shared")
    return *runner, str(_compiled(Path(__file__).with_name(source), (*command, *flags, *variant.flags)))


def _compiled(source: Path, command: tuple[str, ...]) -> Path:
    """Compile a program into kvgen's cache folder, unless it is there; processes that need the same one wait."""
    digest = hashlib.sha256("\0".join((str(source.resolve()), *command)).encode())
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
            subprocess.run([*command, "-w", f"-I{_SOURCE.parent}", str(source), "-o", str(built)], check=True)
            built.replace(path)
    return path
