"""`kvgen score` as its users have it: real processes, pipes, signals and a pseudo-terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests import program


@pytest.fixture
def tiny(tiny_llama) -> str:
    return str(tiny_llama()[0])


run = partial(program.run, "score")


def test_a_text_comes_from_where_the_options_say(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Hello, world!\n")
    results = [
        run("-m", tiny, str(tmp_path / "text")),
        run("-m", tiny, "-f", str(tmp_path / "text")),
        run("-m", tiny, "-p", "Hello, world!"),
        run("-m", tiny, input="Hello, world!\n"),
        run("-m", tiny, "-", input="Hello, world!"),
    ]
    assert len({result.stdout for result in results}) == 1
    assert results[0].stdout.startswith("log-likelihood -")
    assert results[0].stdout.count("\n") == 1


def test_lines_of_json_are_scored_in_order_with_their_fields(tiny: str) -> None:
    lines = ['{"text": "Hello, world!", "id": 7}', '"The quick brown fox"', '{"id": 9, "text": "naïve"}']
    result = run("-m", tiny, "--jsonl", "--tokens", input="\n".join(lines))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer.get("id") for answer in answers] == [7, None, 9]
    assert [answer["text"] for answer in answers] == ["Hello, world!", "The quick brown fox", "naïve"]
    for answer in answers:
        values = [entry["logprob"] for entry in answer["logprobs"]]
        assert values[0] is None
        assert sum(values[1:]) == pytest.approx(answer["log_likelihood"])
        size = len(answer["text"].encode())
        assert answer["bits_per_byte"] == pytest.approx(
            math.log2(answer["perplexity"]) * len(answer["logprobs"]) / size
        )
        assert answer["perplexity"] == pytest.approx(math.exp(-answer["log_likelihood"] / answer["tokens"]))


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        (["-p", "a", "file"], "", 2, "not both"),
        (["no-such-file"], "", 1, "no-such-file: cannot be read"),
        (["-p", "a"], "", 2, "at least two tokens"),
        (["-"], "", 2, "the text is empty"),
        (["-p", "Hello, world!", "--window", "9999"], "", 2, "window of 9999 tokens does not fit"),
    ],
)
def test_errors_are_one_line(tiny: str, arguments: list[str], stdin: str, code: int, message: str) -> None:
    result = run("-m", tiny, *arguments, input=stdin)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "stdin, line 3: not JSON"),
        ('{"text": "fine", "n": NaN}', "line 3: not JSON"),
        ('{"text": "fine", "n": 1e999}', "line 3: not JSON"),
        ('{"text": "fine", "name": "\\ud800"}', "line 3: not JSON"),
        ('{"text": "a", "id": 7}', "stdin, line 3: a text needs at least two tokens"),
        ('{"txt": "x"}', 'line 3: give {"text": "..."} or a string'),
    ],
)
def test_a_line_that_cannot_be_scored_has_an_error_and_the_others_go_on(tiny: str, line: str, message: str) -> None:
    result = run("-m", tiny, "--jsonl", input=f'"Hello, world!"\n\n{line}\n"The quick brown fox"\n')
    assert result.returncode == 1
    assert result.stderr == "kvgen: error: 1 of 3 lines failed: see `error` in their results\n"
    first, bad, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert first["tokens"] > 0 < last["tokens"]
    assert message in bad["error"]
    assert bad.get("id") == (7 if "id" in line else None)


def test_a_line_is_answered_before_the_next_one_is_there(tiny: str, tmp_path: Path) -> None:
    with program.start("score", "-m", tiny, "--jsonl") as (stdin, stdout, process):
        stdin.write('"Hello, world!"\n')
        assert select.select([stdout], [], [], 60)[0], "no answer before the end of stdin"
        assert json.loads(stdout.readline())["text"] == "Hello, world!"
        stdin.write("{\n")
        stdin.close()
        process.join(60)
        assert process.exitcode == 1
        assert json.loads(stdout.read())["error"].startswith("stdin, line 2: not JSON")


def test_infinity_is_null_in_json_and_not_a_number_an_error(tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text(
        "import torch\n"
        "def without_b():\n"
        "    return model(float('-inf'))\n"
        "def broken():\n"
        "    return model(float('nan'))\n"
        "def model(b):\n"
        "    def call(ids, cache=None):\n"
        "        logits = torch.zeros(1, ids.shape[1], 256)\n"
        "        logits[..., 98] = b\n"
        "        return logits, None\n"
        "    return call\n"
    )
    where = ["--tokenizer", "bytes", "-p", "abc", "--json", "--tokens"]
    answer = json.loads(run("-m", f"{tmp_path}/flat.py:without_b", *where).stdout)
    assert answer["log_likelihood"] is answer["perplexity"] is answer["bits_per_byte"] is None
    assert [entry["logprob"] for entry in answer["logprobs"]] == [None, None, pytest.approx(-math.log(255))]
    broken = run("-m", f"{tmp_path}/flat.py:broken", *where)
    assert (broken.returncode, broken.stdout) == (1, "")
    assert broken.stderr.count("\n") == 1


def test_token_ids_have_no_bytes(tiny: str) -> None:
    assert json.loads(run("-m", tiny, "--ids", "-p", "5 17 3", "--json").stdout)["bits_per_byte"] is None
    assert "byte" not in run("-m", tiny, "--ids", "-p", "5 17 3").stdout


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_traceback(smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("The quick brown fox. " * 20_000)
    with subprocess.Popen(
        [sys.executable, "-m", "kvgen", "score", str(tmp_path / "long"), "--window", "64", "--stride", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(6)  # by now it scores; it would for an hour
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == 130


def test_tokens_are_a_line_each(tiny: str) -> None:
    result = run("-m", tiny, "-p", "a\nb \x1b[31m", "--tokens")
    *rows, last = result.stdout.splitlines()
    assert last.startswith("log-likelihood")
    assert "\x1b" not in result.stdout
    assert rows[0].split()[:2] == ["-", "-"]
    assert all(float(row.split()[1]) >= 0 for row in rows[1:])


def on_terminal(*arguments: str, streams: tuple[str, ...] = ("stdout",)) -> tuple[int, str]:
    """Run with some streams on a pseudo-terminal. The exit code and what the terminal was sent."""
    leader, follower = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(_read, leader)
        environment = os.environ | {"TERM": "xterm-256color"}
        result = run(*arguments, env=environment, **dict.fromkeys(streams, follower))
        os.close(follower)
    os.close(leader)
    return result.returncode, shown.result().decode()


def _read(terminal: int) -> bytes:
    """All that is written to a terminal until nobody has it open."""
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 65536):
            shown += part
    return shown


def test_a_terminal_shows_the_text_in_colours_and_nothing_that_steers_it(tiny: str) -> None:
    code, text = on_terminal("-m", tiny, "-p", "日本 [red]x[/] \x1b]0;title\x07", "-q")
    assert code == 0
    assert "48;5;" in text  # a coloured ground
    assert "bits of surprise" in text
    assert "\x1b]0;" not in text
    assert "日本 [red]x[/] \\x1b]0;title\\x07" in re.sub(r"\x1b\[[\d;]*m", "", text)


def test_a_terminal_without_a_text_is_wrong_usage(tiny: str) -> None:
    code, text = on_terminal("-m", tiny, streams=("stdin", "stderr"))
    assert code == 2
    assert "no text: give a FILE or --prompt TEXT" in text


@pytest.mark.slow
def test_a_bar_shows_where_there_is_more_than_one_window(tiny: str) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    assert "scoring" in on_terminal("-m", tiny, "-p", text, "--window", "32", streams=("stderr",))[1]
    for arguments in (["--window", "32", "--quiet"], []):
        assert on_terminal("-m", tiny, "-p", text[:100], *arguments, streams=("stderr",)) == (0, "")


def test_an_empty_text_is_no_prompt(smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for arguments in ([], ["-p", ""], [str(tmp_path / "empty")]):
        found = run(*arguments, input="")
        assert (found.returncode, found.stdout, found.stderr) == (2, "", "kvgen: error: the text is empty\n")
