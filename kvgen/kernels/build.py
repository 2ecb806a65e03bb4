"""Compiles the C++ kernels for this machine at first use, into kvgen's cache folder, and loads them.

They use GCC's vector extensions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from kvgen.errors import UnsupportedError
from kvgen.system import cache_dir

_SOURCE = Path(__file__).parent / "kernels.cpp"
# No -ffast-math: it would reorder sums.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_TIMEOUT = 300  # seconds; compiling takes about four


@cache
def library() -> ctypes.CDLL:
    """Return the kernels, compiled if necessary. Raises UnsupportedError if they cannot be built or loaded."""
    chosen = os.environ.get("CXX")
    found = (shutil.which(name) for name in ([chosen] if chosen else ["g++", "c++"]))
    compiler = next((path for path in found if path), None)
    if compiler is None:
        raise UnsupportedError("no C++ compiler found ($CXX, g++ or c++)")
    path = cache_dir() / "kernels" / f"{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(f"the kernels cannot be loaded: {error}") from error


def _key(compiler: str) -> str:
    """Return a digest of source, flags, compiler and processor."""
    digest = hashlib.sha256()
    for file in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    stat = Path(compiler).stat()
    for part in (*_FLAGS, compiler, stat.st_size, stat.st_mtime_ns, torch.__version__, _processor()):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Return the processor's name and features."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in info if line.startswith(("model", "flags", "Features", "CPU")))


def _compile(compiler: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            if done.returncode:
                why = next((line for line in done.stderr.splitlines() if "error" in line), "it gave no reason")
                raise UnsupportedError(f"{compiler} cannot build the kernels: {why}")
            built.replace(path)  # atomically: another process may be building it too
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"the kernels cannot be built: {error}") from error
