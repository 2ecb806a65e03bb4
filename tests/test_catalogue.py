"""Fetching models: a real wheel through the real package client, and a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvgen import CheckpointError, NotFoundError
from kvgen.hub import catalogue
from kvgen.hub import names as hub
from kvgen.hub.catalogue import CatalogueEntry
from tests.program import run

CONTENT = os.urandom(300_000)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """An entry for a wheel that pip can find on this machine and nowhere else."""
    name, version, member = "kvgen-test-model", "1.0", "kvgen_test_model/model.gguf"
    wheel = tmp_path / "index" / f"kvgen_test_model-{version}-py3-none-any.whl"
    wheel.parent.mkdir()
    info = f"kvgen_test_model-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-package-anywhere\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, CONTENT)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return CatalogueEntry(
        "test", name, version, member, len(CONTENT), "MIT", sha256(wheel.read_bytes()), sha256(CONTENT)
    )


def quiet(*_: Any) -> None:
    pass


def test_the_file_arrives_whole_and_alone(entry: CatalogueEntry, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = tmp_path / "cache"
    path = catalogue.fetch(entry, folder, lambda *update: seen.append(update))
    assert path.read_bytes() == CONTENT
    assert {item.name for item in folder.iterdir()} <= {"model.gguf", "model.gguf.lock"}
    what, done, total = seen[-1]
    assert "model.gguf" in what
    assert "MIT" in what
    assert done == total == len(CONTENT)
    assert catalogue.find(entry, folder) == path


@pytest.mark.parametrize("field", ["wheel_sha256", "file_sha256"])
def test_a_file_with_another_hash_is_refused_and_not_kept(entry: CatalogueEntry, tmp_path: Path, field: str) -> None:
    folder = tmp_path / "cache"
    with pytest.raises((NotFoundError, CheckpointError)) as caught:
        catalogue.fetch(replace(entry, **{field: "0" * 64}), folder, quiet)
    assert "\n" not in str(caught.value)
    assert not (folder / "model.gguf").exists()


def test_a_package_that_cannot_be_had_is_one_clear_error(entry: CatalogueEntry, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="check the network") as caught:
        catalogue.fetch(replace(entry, version="2.0"), tmp_path / "cache", quiet)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_clear_error(entry: CatalogueEntry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFoundError, match="cannot be stored"):
        catalogue.fetch(entry, tmp_path / "file" / "models", quiet)


def test_a_file_of_another_size_is_fetched_again(entry: CatalogueEntry, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(CONTENT[:-1])
    assert catalogue.find(entry, folder) is None
    assert catalogue.fetch(entry, folder, quiet).read_bytes() == CONTENT


def test_two_at_once_both_get_the_whole_file(entry: CatalogueEntry, tmp_path: Path) -> None:
    fetch = (
        "import sys, pathlib\n"
        "from kvgen.hub import catalogue\n"
        f"entry = catalogue.{entry!r}\n"
        "path = catalogue.fetch(entry, pathlib.Path(sys.argv[1]), lambda *_: None)\n"
        "assert len(path.read_bytes()) == entry.size\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", fetch, str(tmp_path / "cache")]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "cache" / "model.gguf").read_bytes() == CONTENT


def test_a_file_of_an_installed_package_is_used_in_place(
    entry: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(next((tmp_path / "index").glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (site / "kvgen_test_model" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(site))
    assert catalogue.find(entry, tmp_path / "cache") == site / entry.member


def test_without_a_package_client_the_error_says_what_to_install(
    entry: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotFoundError, match="pip or uv"):
        catalogue.fetch(entry, tmp_path / "cache", quiet)


# --- References --------------------------------------------------------------------------------------------------


def test_references_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert hub.resolve("owner/name") == Path("owner/name")
    (tmp_path / "smollm2").write_text("")
    assert hub.resolve("smollm2") == Path("smollm2")
    monkeypatch.setenv("KVGEN_MODEL", "owner")
    assert hub.resolve() == Path("owner")
    with pytest.raises(NotFoundError, match="smollm2"):
        hub.resolve("nothing")


def test_offline_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVGEN_OFFLINE", "1")
    monkeypatch.setenv("KVGEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(NotFoundError, match="KVGEN_OFFLINE"):
        hub.resolve("smollm2")
    assert list(tmp_path.iterdir()) == []


# --- A hub on this machine ---------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_server(tiny_llama) -> Iterator[tuple[str, list[str]]]:
    """Serves a tiny model as `owner/name`; yields its address and the requests that it gets."""
    folder, _ = tiny_llama()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            requests.append(path)
            file = folder / path.rpartition("/")[2]
            if path.startswith("/api/models/owner/name/revision"):
                siblings = [{"rfilename": item.name} for item in folder.iterdir()]
                body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode()
            elif path.startswith("/api/models/owner/name/tree"):
                tree = [
                    {"type": "file", "path": item.name, "size": item.stat().st_size, "oid": sha256(item.read_bytes())}
                    for item in folder.iterdir()
                ]
                body = json.dumps(tree).encode()
            elif path.startswith("/owner/name/resolve/") and file.exists():
                body = file.read_bytes()
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{sha256(body)[:40]}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


def run_kvgen(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("generate", "-p", "hello", "-n", "3", "-t", "0", *arguments, env={**os.environ, **environment})


@pytest.mark.slow
def test_a_hub_id_is_downloaded_once_and_then_used_offline(hub_server, tmp_path: Path) -> None:
    address, requests = hub_server
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    first = run_kvgen("-m", "owner/name", **environment)
    assert first.returncode == 0, first.stderr
    assert not any(request.endswith(".bin") for request in requests)
    requests.clear()
    again = run_kvgen("-m", "owner/name", **environment)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert requests == []
    offline = run_kvgen("-m", "owner/name", KVGEN_OFFLINE="1", **environment)
    assert (offline.returncode, offline.stdout) == (0, first.stdout)


def test_a_hub_id_is_fetched_with_its_progress_told(hub_server, tmp_path: Path, tiny_llama) -> None:
    address, _ = hub_server
    code = (
        "from kvgen.hub import names; seen = []; names.resolve('owner/name', progress=lambda *u: seen.append(u)); "
        "print(seen[-1][0], seen[-1][1] == seen[-1][2], seen[-1][2])"
    )
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    wanted = [item for item in (tmp_path / "tiny").iterdir() if item.suffix in (".json", ".safetensors")]
    assert result.stdout == f"owner/name True {sum(item.stat().st_size for item in wanted)}\n", result.stderr
    pull = ["models", "pull", "owner/name"]
    again = run(*pull, env={**os.environ, **environment})
    assert (again.returncode, again.stderr) == (0, "")  # it is here
    assert (Path(again.stdout.rstrip("\n")) / "config.json").exists()
    environment["HF_HOME"] = str(tmp_path / "other")
    first = run(*pull, env={**os.environ, **environment})
    assert (first.returncode, first.stderr) == (0, "downloading owner/name\n")


def test_a_hub_id_that_does_not_exist_is_one_clear_error(hub_server, tmp_path: Path) -> None:
    address, _ = hub_server
    result = run_kvgen("-m", "owner/other", HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "owner/other" in result.stderr


def test_a_hub_id_offline_and_not_in_the_cache_is_one_clear_error(tmp_path: Path) -> None:
    result = run_kvgen("-m", "owner/name", HF_HOME=str(tmp_path / "hf"), KVGEN_OFFLINE="1")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "KVGEN_OFFLINE" in result.stderr
