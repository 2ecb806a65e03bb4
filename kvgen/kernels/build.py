"""Loads the C++ kernels for this processor: from the package, or compiled at first use into kvgen's cache folder."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock

from kvgen.errors import KvgenError, UnsupportedError
from kvgen.kernels.compiler import compile_kernels, find_compiler, knows_flags, library_name
from kvgen.kernels.processors import NATIVE, Variant, asked_variant, chosen_variant, machine_variants
from kvgen.system import cache_dir

PREBUILT = Path(__file__).parent / "libraries"  # only in wheels; see setup.py
# Seconds. Libraries are touched when they are loaded. So versions of kvgen that are used side by side keep theirs, and
# what an update leaves behind, 0.3 MB each, goes when it has not been loaded for this long.
_KEEP_UNUSED = 30 * 24 * 3600
_KEEP_UNFINISHED = 3600


def library() -> ctypes.CDLL:
    """Return the kernels of `available_variant`, compiled if necessary.

    Raises UsageError if $KVGEN_CPU is no variant, UnsupportedError if the kernels cannot run, be built or be loaded.
    """
    return _load(available_variant())


def available_variant() -> Variant:
    """Return `chosen_variant`; where it must be compiled and $KVGEN_CPU names none, the best that the compiler knows.

    Raises as `library` does, also if there is no compiler.
    """
    variant = chosen_variant()
    if _prebuilt(variant) is not None:
        return variant
    compiler = find_compiler()
    if asked_variant() != NATIVE or _cached(variant, compiler).exists():
        return variant
    usable = (one for one in machine_variants() if not one.lacking() and knows_flags(compiler, one))
    return next(usable, variant)


def must_compile() -> bool:
    """Whether `library` would compile, which takes some ten seconds."""
    try:
        variant = available_variant()
        return _prebuilt(variant) is None and not _cached(variant, find_compiler()).exists()
    except KvgenError:
        return False


@cache
def _load(variant: Variant) -> ctypes.CDLL:
    path = _prebuilt(variant) or _compiled(variant)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnsupportedError(f"the kernels cannot be loaded: {error}") from error


def _compiled(variant: Variant) -> Path:
    compiler = find_compiler()
    path = _cached(variant, compiler)
    if path.exists():
        with suppress(OSError):  # a cache folder that cannot be written to
            os.utime(path)
    else:
        with _locked(path.parent):
            if not path.exists():
                compile_kernels(compiler, variant, path)
        _sweep(path.parent)
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for other processes that compile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock").acquire()  # outside of what is swept
    except OSError as error:
        raise UnsupportedError(f"the kernels cannot be built: {error}") from error
    with lock:
        yield


def _prebuilt(variant: Variant) -> Path | None:
    path = PREBUILT / library_name(variant)
    return path if path.exists() else None


def _cached(variant: Variant, compiler: str) -> Path:
    return cache_dir() / "kernels" / library_name(variant, compiler)


def _sweep(folder: Path) -> None:
    """Delete libraries that were not loaded for long, and what interrupted compilers left."""
    now = time.time()
    for entry in folder.iterdir():
        with suppress(OSError):  # another process may be sweeping too
            age = now - entry.stat().st_mtime
            if entry.is_dir() and age > _KEEP_UNFINISHED:
                shutil.rmtree(entry)
            elif age > _KEEP_UNUSED:
                entry.unlink()
