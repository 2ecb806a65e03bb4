"""Every command on a terminal, in a pipe and with stdin closed: exit code, and what comes on which stream."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.program import CLOSED, KVGEN, run, run_on_terminal
from tests.sizes import first

ANSI = re.compile("\x1b")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> dict[str, list[str]]:
    """What each is called with: a tiny model, and little to do."""
    from tests.families import make_checkpoint

    folder = tmp_path_factory.mktemp("model")
    make_checkpoint("llama", 0, folder)
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))  # for what is to be converted
    model = ["-m", str(folder), "--ids"]
    rows = folder / "rows.jsonl"
    rows.write_text('"5 17 3"\n{"id": "b", "prompt": "4 5"}\n')
    template = folder / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    cache = folder / "x.cache"
    made = run("generate", *model, "-p", "5 17 3", "-n", "2", "--prompt-cache", str(cache))
    assert made.returncode == 0, made.stderr
    return {
        "generate": ["generate", *model, "-p", "5 17 3", "-n", "2", "-t", "0"],
        "batch": ["batch", str(rows), *model, "-n", "2", "-t", "0", "--seed", "1"],
        "chat": ["chat", *model, "-p", "5 17 3", "-n", "2", "-t", "0", "-q", "--chat-template", str(template)],
        "compare": ["compare", *model, "-p", "5 17 3", "-n", "2"],
        "score": ["score", *model, "-p", "5 17 3 9", "--tokens"],
        "bench": ["bench", *model, *["--prompts", "8", "--contexts", "4", "--lengths", "4", "--repeat", "1"]],
        "inspect": ["inspect", str(smollm2_path)],
        "convert": ["convert", str(folder), "--to", "x-transformers", str(folder / "WAY")],
        "models": ["models"],
        "cache": ["cache", "inspect", str(cache)],
        "config": ["--profile", "p", "config"],
    }


NAMES = ["generate", "batch", "compare", "chat", "score", "bench", "inspect", "convert", "models", "cache", "config"]
TIMED = {"bench", "compare"}  # they print how long things took
WRITES_FILES = {"convert"}  # and says so, on stderr


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text("[profile.p]\ntop-k = 3\n")
    monkeypatch.setenv("KVGEN_CONFIG", str(tmp_path / "config.toml"))


@pytest.mark.parametrize("name", first(1, NAMES))
@pytest.mark.usefixtures("config")
def test_a_command_works_on_a_terminal_in_a_pipe_and_without_stdin(commands: dict[str, list[str]], name: str) -> None:

    def called(way: str) -> list[str]:
        return [word.replace("WAY", way) for word in commands[name]]

    def said(result: subprocess.CompletedProcess[str]) -> str:
        """What it prints, on the one stream that it prints on."""
        said, silent = (result.stderr, result.stdout) if name in WRITES_FILES else (result.stdout, result.stderr)
        assert (result.returncode, silent) == (0, ""), result.stderr
        return said

    piped = said(run(*called("pipe"), input=""))
    assert piped.endswith("\n")
    assert not ANSI.search(piped)
    closed = said(run(*called("closed"), stdin=CLOSED))
    if name not in TIMED:
        assert closed == piped.replace("pipe", "closed")
    code, shown = run_on_terminal(*called("terminal"))
    assert code == 0
    assert "Traceback" not in shown
    assert piped.split()[0] in re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", shown)


@pytest.mark.parametrize("stderr", first(1, ["2>&-", "2>/dev/full", "<&- 2>&-"]))
@pytest.mark.parametrize("name", first(1, NAMES))
@pytest.mark.usefixtures("config")
def test_a_stderr_that_takes_nothing_costs_no_output(commands: dict[str, list[str]], name: str, stderr: str) -> None:
    words = [*commands[name], *(["--stats"] if name in ("generate", "batch") else [])]

    def called(way: str) -> list[str]:
        return [word.replace("WAY", f"{way} {stderr}".replace("/", "")) for word in words]

    whole = run(*called("whole"), input="")
    shell = ["bash", "-c", f'exec "$@" {stderr}', "bash", *KVGEN, *called("nowhere")]
    found = subprocess.run(shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=120)
    assert found.returncode == whole.returncode == 0
    if name in TIMED:
        assert len(found.stdout.splitlines()) == len(whole.stdout.splitlines())
    else:
        assert found.stdout == whole.stdout


def run_without_reader(*arguments: str) -> tuple[int, str]:
    """Run with a pipe for stdout whose reader has left; returns the exit code and stderr."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = run(*arguments, stdout=write_end)
    finally:
        os.close(write_end)
    return result.returncode, result.stderr


@pytest.mark.parametrize("name", first(3, NAMES))
@pytest.mark.usefixtures("config")
def test_a_command_whose_reader_has_left_ends_well(commands: dict[str, list[str]], name: str) -> None:
    code, errors = run_without_reader(*(word.replace("WAY", "unread") for word in commands[name]))
    assert code == 0, errors
    assert "Traceback" not in errors and "Exception" not in errors


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["generate", "--help"], ["cache", "--help"]], ids=str)
def test_help_whose_reader_has_left_ends_well(words: list[str]) -> None:
    assert run_without_reader(*words) == (0, "")


@pytest.mark.parametrize("words", first(1, [[], ["--json"]]), ids=str)
def test_a_verdict_keeps_its_exit_code_when_the_reader_has_left(tmp_path: Path, tiny_llama, words: list[str]) -> None:
    model = tmp_path / "model.py"
    model.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from tests.faults import SmallDecoder\nwrong = lambda: SmallDecoder('positions restart at 0')\n"
    )
    assert run_without_reader("compare", "-m", f"{model}:wrong", "--ids", "-p", "5 17 3", "-n", "6", *words) == (1, "")
    folder, _ = tiny_llama()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "mamba"}))
    assert run_without_reader("inspect", str(folder), *words) == (1, "")


@pytest.mark.parametrize("name", NAMES)
def test_a_command_explains_itself_and_refuses_what_it_does_not_know(name: str) -> None:
    words = [name, "inspect"] if name == "cache" else [name]
    shown = run(*words, "--help")
    assert shown.returncode == 0
    assert f"Usage: kvgen {' '.join(words)}" in shown.stdout
    assert "Example" in shown.stdout
    assert "<bool>" not in shown.stdout
    assert all(char.isascii() or char in "…•" or 0x2500 <= ord(char) < 0x2580 for char in shown.stdout)  # no emoji
    assert "other commands" not in shown.stdout
    if "--chat " not in shown.stdout:
        assert "--chat:" not in shown.stdout
    wrong = run(*words, "--no-such-option")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 1
    assert "No such option" in wrong.stderr
