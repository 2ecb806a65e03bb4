"""The C++ kernels as a library: compiled for this machine the first time, and kept in kvgen's cache folder.

They are written in GCC's dialect, for its vectors.
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

SOURCE = Path(__file__).parent / "kernels.cpp"
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# Sums must not be reordered, so no -ffast-math.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_TIMEOUT = 300  # seconds; it takes about four


@cache
def library() -> ctypes.CDLL:
    """The kernels, ready to call. Raises UnsupportedError where they cannot be built or loaded."""
    compiler = _compiler()
    if compiler is None:
        raise UnsupportedError("no C++ compiler found ($CXX, g++ or c++)")
    path = cache_dir() / "kernels" / f"{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(f"the kernels cannot be loaded: {error}") from error


def _compiler() -> str | None:
    chosen = os.environ.get("CXX")
    found = (shutil.which(name) for name in ([chosen] if chosen else ["g++", "c++"]))
    return next((path for path in found if path), None)


def _key(compiler: str) -> str:
    """What the library depends on: its source, how it is compiled, and the processor that it is compiled for."""
    digest = hashlib.sha256()
    for file in (SOURCE, *HEADERS):
        digest.update(file.read_bytes())
    stat = Path(compiler).stat()
    for part in (*_FLAGS, compiler, stat.st_size, stat.st_mtime_ns, torch.__version__, _processor()):
        digest.update(f"{part}\0".encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """The processor's name and what it can do, as far as the system says."""
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
            command = [compiler, *_FLAGS, str(SOURCE), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            if done.returncode:
                why = next((line for line in done.stderr.splitlines() if "error" in line), "it gave no reason")
                raise UnsupportedError(f"{compiler} cannot build the kernels: {why}")
            built.replace(path)  # at once: another process may be building it too
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"the kernels cannot be built: {error}") from error
