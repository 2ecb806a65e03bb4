"""Compiles the C++ kernels. setup.py, which runs without kvgen's dependencies, uses it too."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from kvgen.errors import UnsupportedError
from kvgen.kernels.processors import Variant

_SOURCE = Path(__file__).parent / "kernels.cpp"
# Logits have the same bits on all processors. So no -ffast-math, which would reorder sums, and no contraction of a
# product and a sum into one rounding, which a compiler does where it likes: the source says where it wants that.
_EXACT = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_FLAGS = ("-std=c++17", "-O3", "-pthread", *_EXACT, "-shared", "-fPIC")
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_TIMEOUT = 300  # seconds


def find_compiler() -> str:
    """Return the path of the C++ compiler. Raises UnsupportedError if there is none."""
    chosen = os.environ.get("CXX")
    found = (shutil.which(name) for name in ([chosen] if chosen else ["g++", "clang++", "c++"]))
    compiler = next((path for path in found if path), None)
    if compiler is None:
        raise UnsupportedError("no C++ compiler found ($CXX, g++, clang++ or c++)")
    return compiler


@cache
def knows_flags(compiler: str, variant: Variant) -> bool:
    """Return whether a compiler accepts the flags of a variant. Old ones lack the newest instructions."""
    command = [compiler, *variant.flags, "-x", "c++", "-E", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def library_name(variant: Variant, compiler: str | None = None) -> str:
    """Return the file name of a compiled variant, with a digest of its source and flags, and of the compiler if given.

    So a library of another source is never loaded.
    """
    digest = hashlib.sha256()
    for file in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    identity: tuple[object, ...] = ()
    if compiler is not None:
        stat = Path(compiler).stat()
        identity = (compiler, stat.st_size, stat.st_mtime_ns)
    for part in (*_FLAGS, *variant.flags, *identity):
        digest.update(f"{part}\0".encode())
    return f"{variant.name}-{digest.hexdigest()[:32]}{_SUFFIX}"


def compile_kernels(compiler: str, variant: Variant, path: Path) -> None:
    """Compile a variant into the library `path`. Raises UnsupportedError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [compiler, *_FLAGS, *variant.flags, str(_SOURCE), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            if done.returncode:
                ended = f"it ended with exit code {done.returncode}"
                why = next((line for line in done.stderr.splitlines() if "error" in line), ended)
                raise UnsupportedError(f"{compiler} cannot build the kernels: {why}")
            if not built.exists():
                raise UnsupportedError(f"{compiler} cannot build the kernels: it wrote nothing")
            built.replace(path)  # atomically: another process may load it at once
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"{compiler} cannot build the kernels in {_TIMEOUT} seconds") from None
    except OSError as error:
        raise UnsupportedError(f"the kernels cannot be built: {error}") from error
