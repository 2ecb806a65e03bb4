"""Files from strangers: what docs/security.md promises and no other file tests."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

import kvgen
from kvgen import CheckpointError, NotFoundError, UnsupportedError
from kvgen.backends import weights
from kvgen.loading.inspect import inspect
from tests.program import KVGEN, run_on_terminal

ROOT = Path(__file__).parent.parent


class Bomb:
    """A pickle that leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.safetensors", "config.json", "tokenizer.json"]
)
def test_a_pickle_is_not_unpickled_whatever_it_is_called(tiny_llama, tmp_path: Path, name: str) -> None:
    folder, _ = tiny_llama()
    if name.startswith(("pytorch", "model.")):
        (folder / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises((CheckpointError, UnsupportedError)):
        kvgen.load(folder)
    assert not mark.exists()


FILES = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
def test_pipes_devices_and_folders_are_refused_at_once(tiny_llama, name: str, kind: str) -> None:
    folder, _ = tiny_llama()
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="not a file"):
        kvgen.load(folder)
    assert time.monotonic() - start < 5


def test_a_gguf_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(NotFoundError, match="not a file or folder"):
        kvgen.load(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_a_text_file_of_gigabytes_is_not_read(tiny_llama, name: str) -> None:
    folder, _ = tiny_llama()
    with (folder / name).open("wb") as file:
        file.truncate(3 << 30)  # it takes no room on the disk
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="larger than"):
        kvgen.load(folder)
    assert time.monotonic() - start < 5


def test_an_index_names_shards_only_in_its_folder(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(CheckpointError, match="names a file outside the folder"):
        kvgen.load(folder)


def test_weights_that_no_memory_would_hold_are_refused_before_they_are_read(
    tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tiny_llama()
    monkeypatch.setattr(weights, "total_memory", lambda: 10_000)
    for kernels in ("cpp", "off"):
        with pytest.raises(UnsupportedError, match="this machine has"):
            kvgen.load(folder, kernels=kernels)


SIZES = [2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, 0, -1, -(2**63), 1e30, math.inf, 1.5, "8", True]


COUNTS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
NUMBERS = ["num_key_value_heads", "max_position_embeddings", "sliding_window", "rms_norm_eps", "rope_theta"]


@pytest.mark.parametrize("key", [*COUNTS, *NUMBERS])
def test_any_size_in_a_config_is_refused_by_name_or_harmless(tiny_llama, key: str) -> None:
    folder, _ = tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    for size in SIZES:
        (folder / "config.json").write_text(json.dumps({**config, key: size}))
        for use in (kvgen.load, inspect):
            with contextlib.suppress(kvgen.KvgenError):
                use(folder)


@pytest.mark.parametrize(("part", "key"), [("wrapper", "num_tokens"), ("wrapper", "max_seq_len"), ("decoder", "dim")])
def test_any_size_in_a_config_of_x_transformers_is_refused_or_harmless(
    x_rotary: Path, tmp_path: Path, part: str, key: str
) -> None:
    folder = shutil.copytree(x_rotary, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for size in SIZES:
        (folder / "config.json").write_text(json.dumps({**config, part: {**config[part], key: size}}))
        with contextlib.suppress(kvgen.KvgenError):
            kvgen.load(folder)


def test_names_of_a_file_cannot_steer_the_terminal_of_any_command(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    evil = tmp_path / "\x1b]52;c;ZXZpbA==\x07\u202eevil"
    shutil.copytree(folder, evil)
    rows = tmp_path / "rows"
    rows.write_text('{"id": "\\u001b]8;;http://x\\u0007", "prompt": "a", "metadata": "\\u202e\\u009b2J"}\n')
    commands = [
        ("inspect", str(evil)),
        ("compare", "-m", str(evil), "-n", "2"),
        ("batch", str(rows), "-m", str(evil), "-n", "2", "--stats"),
        ("batch", str(evil / "nothing.jsonl")),
        ("chat", "-m", str(evil), "-p", "x"),
        ("cache", "inspect", str(evil / "config.json")),
    ]
    for command in commands:
        _, shown = run_on_terminal(*command)
        assert "\x1b]" not in shown, command
        assert not re.search("[\x07\x80-\x9f\u202a-\u202e]", shown), command


def test_torch_has_no_switch_that_lets_pickles_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD counts where the caller says nothing; kvgen says `weights_only=True`."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "mark"
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.json").write_text('{"library": "x-transformers", "wrapper": {}, "decoder": {}}')
    torch.save({"a": Bomb(mark)}, folder / "model.pt")
    with pytest.raises(CheckpointError):
        kvgen.load(folder)
    assert not mark.exists()


def test_every_promise_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+)\.(test_\w+)`", page)
    assert len(named) > 25
    for module, function in named:
        assert f"def {function}(" in (ROOT / "tests" / f"{module}.py").read_text(), f"{module}.{function}"


@pytest.mark.slow
def test_without_being_asked_nothing_is_written_outside_the_cache_folder(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KVGEN", "XDG", "HF"))}
    environment |= {"HOME": str(home), "KVGEN_CACHE_DIR": str(tmp_path / "cache"), "KVGEN_OFFLINE": "1"}
    working = tmp_path / "working"
    working.mkdir()
    command = [*KVGEN, "generate", "-m", str(folder), "-p", "x", "-n", "2"]
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=working)
    assert list(home.rglob("*")) == []
    assert list(working.iterdir()) == []
