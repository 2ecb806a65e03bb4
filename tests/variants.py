"""Programs of the kernels for each processor: compiled once, run here or emulated."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
from filelock import FileLock

from kvgen.kernels import build
from kvgen.system import cache_dir

_KERNELS = Path(build.__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_SYSROOT = "/usr/aarch64-linux-gnu"
_FOREIGN = MappingProxyType({"g++": ("aarch64-linux-gnu-g++",), "clang++": ("clang++", "--target=aarch64-linux-gnu")})


class Variant(NamedTuple):
    """A kind of processor. needs: its features, as /proc/cpuinfo names them."""

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]


# TODO-ON-MERGE: import these, and the flags above, from kvgen.kernels.processors.
_VARIANTS = (
    Variant("avx2", "x86_64", ("-march=x86-64-v3",), ("avx2", "fma", "f16c")),
    Variant("avx-vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), ("avx2", "fma", "f16c", "avx_vnni")),
    Variant("avx512", "x86_64", ("-march=x86-64-v4",), ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    Variant("avx512-vnni", "x86_64", ("-march=x86-64-v4", "-mavx512vnni"), ("avx512f", "avx512bw", "avx512_vnni")),
    Variant("neon", "aarch64", ("-march=armv8.2-a+dotprod",), ("asimd", "asimddp")),
)
VARIANTS: Mapping[str, Variant] = MappingProxyType({variant.name: variant for variant in _VARIANTS})


def runs_here(variant: Variant) -> bool:
    """Whether this processor is of the kind."""
    return variant.machine == platform.machine() and set(variant.needs) <= _features()


def emulated(variant: Variant) -> bool:
    """Whether it is a kind for another machine, which qemu emulates."""
    return variant.machine == "aarch64" != platform.machine()


@cache
def program(source: str, name: str, compiler: str = "g++") -> tuple[str, ...]:
    """Compile a program of tests/ for a kind of processor, and return the command that runs it; or skip the test."""
    variant = VARIANTS[name]
    command: tuple[str, ...] = (compiler,)
    runner: tuple[str, ...] = ()
    if emulated(variant):
        command, runner = _FOREIGN[compiler], ("qemu-aarch64", "-L", _SYSROOT)
    elif not runs_here(variant):
        pytest.skip(f"this processor is not of the kind {name}")
    for tool in (command[0], *runner[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if runner and not Path(_SYSROOT).is_dir():
        pytest.skip(f"there are no libraries for {variant.machine} in {_SYSROOT}")
    return *runner, str(_compiled(Path(__file__).with_name(source), (*command, *_FLAGS, *variant.flags)))


def _compiled(source: Path, command: tuple[str, ...]) -> Path:
    """Compile a program into kvgen's cache folder, unless it is there; processes that need the same one wait."""
    digest = hashlib.sha256("\0".join((str(source.resolve()), *command)).encode())
    name = f"{source.stem}-{digest.hexdigest()[:8]}"
    for file in (source, *sorted(_KERNELS.glob("*.cpp")), *sorted(_KERNELS.glob("*.h"))):
        digest.update(file.read_bytes())
    folder = cache_dir() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{digest.hexdigest()[:16]}"
    with FileLock(folder / f"{name}.lock"):
        if not path.exists():
            for old in folder.glob(f"{name}-*"):
                old.unlink()
            built = folder / f"{name}.new"
            subprocess.run([*command, "-w", f"-I{_KERNELS}", str(source), "-o", str(built)], check=True)
            built.replace(path)
    return path


@cache
def _features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, ()))
