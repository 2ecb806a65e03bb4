"""The commands with `--server`: the same bytes and exit codes as without, from a model in another process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from typer.main import get_command

import kvgen
from kvgen.cli import app
from kvgen.client.connection import ServerAddress
from kvgen.client.remote import connect
from kvgen.errors import KvgenError
from kvgen.system import runtime_dir
from tests.families import make_model
from tests.program import KVGEN, run
from tests.sizes import first
from tests.test_server import Served, serving

PROMPT = "Once upon a time,"
GREEDY = ("-t", "0", "-n", "8")
ROWS = """"The capital of France is"
{"prompt": "x", "temperature": "hot"}
{"messages": [{"role": "user", "content": "Hi"}]}
"""
TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}<s>assistant: "
TIMES = ("first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
COUNTS = ("positions_reused", "positions_computed")  # a server has caches of earlier requests


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[Served]:
    with serving("-m", str(smollm2_path)) as served:
        yield served


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: tokenizers.Tokenizer) -> Path:
    """A folder with a random model that can chat."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama", {"vocab_size": 384, "max_position_embeddings": 8192}).save_pretrained(folder)
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tiny_server(tiny: Path) -> Iterator[Served]:
    with serving("-m", str(tiny)) as served:
        yield served


def address(server: Served) -> str:
    return f"http://127.0.0.1:{server.port}"


def comparable(text: str) -> list[Any]:
    """The lines of an output, without what may differ."""
    lines: list[Any] = []
    for line in text.splitlines():
        value = json.loads(line) if line.startswith("{") else line
        if isinstance(value, dict):
            value = {name: part for name, part in value.items() if name not in (*TIMES, *COUNTS)}
        lines.append(value)
    return lines


@pytest.mark.parametrize(
    "case",
    first(
        8,
        [
            (("generate", PROMPT, "--seed", "3", "-n", "8", "--json", "--logprobs", "2"), None),
            (("generate", "--lines", "--json", "--seed", "1", *GREEDY), "Hi\n" + "word " * 9000 + "\n"),
            (("generate", "--chat", "--system", "Be brief.", "-p", "Hi </s>", *GREEDY), None),
            (("generate", "word " * 9000), None),
            (("batch", "--seed", "1", "-n", "6"), ROWS),
            (("score", "-p", "The capital of France is Paris. \u65e5\u672c", "--tokens"), None),
            (
                ("score", "--jsonl", "--tokens", "--window", "8"),
                '"Hello, world! Once more."\n{"text": "x"}\n{"no": 1}\n',
            ),
            (("chat", "-p", "What is the capital of Japan?", *GREEDY), None),
            (("generate", PROMPT, *GREEDY, "--no-cache", "--logit-bias", "260=-100", "--stop", "city"), None),
            (("generate", "--lines", *GREEDY), "The capital of France is\n\ud83d\ude00 One, two,\n"),
            (("generate", "--regex", " [A-Z][a-z]+", "-p", "The capital of France is", *GREEDY), None),
            (("generate", PROMPT, "--max-context", "1000000"), None),
            (("generate", PROMPT, "--regex", "["), None),
            (("batch", "--strict", *GREEDY), ROWS),
        ],
    ),
)
def test_output_errors_and_exit_codes_are_those_of_a_model_that_is_loaded_here(
    tiny_server: Served, tiny: Path, case: tuple[tuple[str, ...], str | None]
) -> None:
    arguments, given = case
    there = run(*arguments, "--server", address(tiny_server), input=given)
    here = run(*arguments, "-m", str(tiny), input=given)
    assert (there.returncode, comparable(there.stdout)) == (here.returncode, comparable(here.stdout))
    assert there.stderr == here.stderr


def test_a_client_imports_neither_torch_nor_tokenizers(server: Served, tmp_path: Path) -> None:
    code = "import sys; from kvgen.__main__ import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('"x"\n')
    for arguments in (
        ("generate", PROMPT, *GREEDY),
        ("batch", str(rows), "-o", str(tmp_path / "out"), *GREEDY),
        ("score", "-p", PROMPT),
        ("chat", "-p", "Hi", *GREEDY),
    ):
        command = [sys.executable, "-c", code, *arguments, "--server", address(server)]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert result.returncode == 0, result.stderr
        assert not {"torch", "tokenizers", "numpy", "gguf"} & set(result.stderr.split())


def test_the_environment_names_the_server_and_stats_are_shown(server: Served) -> None:
    environment = {**os.environ, "KVGEN_SERVER": address(server)}
    ids = " ".join(f"word{number}" for number in range(60))
    first, second = (run("generate", ids, "-n", "1", "--stats", "-t", "0", env=environment) for _ in range(2))
    assert first.stdout == second.stdout
    shown = r"cache: \d+ kB per position.*\n\d+ prompt tokens, 1 generated \(length\) \| load .* on cpu, C\+\+ kernels"
    assert re.match(shown, second.stderr)
    assert "reused, 1 computed" in second.stderr


def test_rows_of_a_server_continue_without_it(server: Served, smollm2_path: Path, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('"a"\n"b"\n')
    options = ("batch", str(rows), "-o", str(output), "--seed", "5", "-n", "4")
    assert run(*options, "--server", address(server)).returncode == 0
    rows.write_text('"a"\n"b"\n"c"\n')
    result = run(*options, "--resume", "-m", str(smollm2_path))
    assert (result.returncode, len(output.read_text().splitlines())) == (0, 3), result.stderr


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("generate", "x", "-m", "other"), "--model"),
        (("generate", "x", "--speculate", "lookup"), "--speculate"),
        (("generate", "x", "--prompt-cache", "f"), "--prompt-cache"),
        (("generate", "x", "--verify-cache"), "--verify-cache"),
        (("score", "-p", "x", "--kv-dtype", "int8"), "--kv-dtype"),
        (("chat", "-p", "x", "--prompt-cache", "f"), "--prompt-cache"),
        (("batch", "/dev/null", "--max-cache-memory", "1GB"), "--max-cache-memory"),
    ],
)
def test_what_the_server_decides_is_refused_by_name(arguments: tuple[str, ...], option: str) -> None:
    result = run(*arguments, "--server", "http://127.0.0.1:1")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert f"{option} does not go with --server http://127.0.0.1:1" in result.stderr


@pytest.mark.parametrize(("where", "code"), [("http://127.0.0.1:1", 1), ("unix:/no/socket", 1), ("ftp://x", 2)])
@pytest.mark.parametrize("command", ["generate", "score", "chat"])
def test_no_server_is_one_line(command: str, where: str, code: int) -> None:
    result = run(command, "-p", "x", "--server", where)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (code, "", 1)
    assert f"--server {where}" in result.stderr


def test_another_version_and_other_servers_are_named(server: Served) -> None:
    with pytest.raises(KvgenError, match=r"the server is kvgen .*, this is 0\.0"):
        connect(address(server), None, "0.0")
    with pytest.raises(KvgenError, match="no server of this version"):
        ServerAddress(f"{address(server)}/elsewhere").ask("/model")
    with pytest.raises(KvgenError, match="no server of this version"):
        ServerAddress(f"{address(server)}/\xe9 \u9375\udcff").ask("/model")
    for host in ("\xe9" * 70, "a b"):
        with pytest.raises(KvgenError, match="no server answers there"):
            ServerAddress(f"http://{host}").ask("/model")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("run", {"prompt": "x"}, "prompt"),
        ("run", {"prompt": [1], "foo": 1}, "`foo`"),
        ("run", {"prompt": [1], "sampling": {"temperature": -1}}, "temperature"),
        ("run", {"prompt": [1], "sampling": {"logit_bias": {"x": 1}}}, "`logit_bias`"),
        ("run", {"prompt": [1], "constraint": {"kind": "x", "text": ""}}, "`constraint`"),
        ("run", {"prompt": [1], "stop": [1]}, "stop"),
        ("run", {"prompt": []}, "the prompt is empty"),
        ("run", {"prompt": [1], "constraint": {"kind": "regex", "text": "["}}, "regex"),
        ("encode", {"messages": "x"}, "messages"),
        ("encode", {"text": "x", "parse_special": 1}, "`parse_special`"),
        ("tokens", {"ids": [-1]}, "`ids`"),
        ("pieces", {"ids": "x"}, "`ids`"),
        ("cache-bytes", {"positions": "many"}, "`positions`"),
        ("score", {"text": 1}, "`text`"),
        ("score", {"text": "x"}, "two tokens"),
        ("score", {"text": "x", "more": 1}, "`more`"),
    ],
)
def test_bad_requests_are_named(server: Served, path: str, body: Any, message: str) -> None:
    status, answer = server.request("POST", f"/kvgen/v1/{path}", body)
    assert (status, answer["error"]["type"]) == (400, "UsageError")
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("encode", {"text": "x" * 7_000_000}, "ContextError"),
        ("encode", {"messages": [{"role": "user", "content": "x"}] * 8193}, "ContextError"),
        ("run", {"prompt": [1], "stop": ["z"] * 65}, "UsageError"),
    ],
)
def test_what_would_take_the_server_long_is_refused(server: Served, path: str, body: Any, kind: str) -> None:
    status, answer = server.request("POST", f"/kvgen/v1/{path}", body)
    assert (status, answer["error"]["type"]) == (400, kind)


def test_an_api_key_may_have_any_letters(smollm2_path: Path) -> None:
    with serving("-m", str(smollm2_path), KVGEN_API_KEY="cl\xe9 \u9375") as served:
        assert connect(address(served), "cl\xe9 \u9375", kvgen.__version__).model.context_length == 8192
        with pytest.raises(KvgenError, match="the API key is missing or wrong"):
            connect(address(served), "cl\xe8", kvgen.__version__)


@pytest.mark.parametrize("key", ["a\nb", "a\x7f", "a ", "\udcff"])
@pytest.mark.parametrize("command", [("generate", "x", "--server", "http://127.0.0.1:1"), ("serve",)])
def test_an_api_key_that_a_header_cannot_carry_is_refused(command: tuple[str, ...], key: str) -> None:
    result = run(*command, env={**os.environ, "KVGEN_API_KEY": key})
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "KVGEN_API_KEY" in result.stderr


def test_ctrl_c_keeps_the_text_and_frees_the_row(server: Served) -> None:
    command = [*KVGEN, "generate", PROMPT, "-n", "-1", "--seed", "1", "--server", address(server)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as client:
        assert client.stdout is not None and client.stderr is not None
        text = client.stdout.readline()
        client.send_signal(signal.SIGINT)
        rest, errors = client.communicate(timeout=60)
    assert (client.returncode, errors) == (130, b"")
    assert text and (text + rest).endswith(b"\n")
    server.wait_until_idle()


@pytest.mark.slow
def test_a_busy_server_is_waited_for_and_one_that_is_killed_is_one_line(smollm2_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "caches"
    options = ("-m", str(smollm2_path), "--batch-size", "1", "--max-waiting", "0", "--prompt-cache", str(folder))
    long = " ".join(f"word{number}" for number in range(400))
    with serving(*options, KVGEN_API_KEY="secret") as before:
        refused = run("generate", long, *GREEDY, "--server", address(before))
        assert (refused.returncode, "the API key is missing" in refused.stderr) == (1, True)
        environment = {**os.environ, "KVGEN_API_KEY": "secret", "KVGEN_SERVER": address(before)}
        rows = "".join(f'"{long} {number}"\n' for number in range(4))
        alone = run("batch", "--batch-size", "4", *GREEDY, input=rows, env=environment)
        assert (alone.returncode, len(alone.stdout.splitlines())) == (0, 4), alone.stderr
        before.send_signal(signal.SIGTERM)
        assert before.end() == 0
    files = {path: path.read_bytes() for path in folder.glob("*.cache")}
    assert files
    (folder / ".kvgen-left").mkdir()
    with serving(*options) as after:
        environment = {**os.environ, "KVGEN_SERVER": address(after)}
        found = json.loads(run("generate", f"{long} 0", "-n", "1", "--json", env=environment).stdout)
        assert found["positions_computed"] == 1
        command = [*KVGEN, "generate", PROMPT, "-n", "-1", "--seed", "1"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline()
            after.process.kill()
            _, errors = client.communicate(timeout=60)
    assert (client.returncode, len(errors.splitlines())) == (1, 1)
    assert b"the server ended during the request" in errors
    assert {path: path.read_bytes() for path in folder.iterdir() if path.suffix == ".cache"} == files
    assert not (folder / ".kvgen-left").exists()


def test_a_server_in_the_background(smollm2_path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "new" / "folder")}

    def kvgen(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*KVGEN, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment
        )

    started = kvgen("serve", "--detach", "-m", str(smollm2_path))
    try:
        assert started.returncode == 0, started.stderr
        where = re.search(r"export KVGEN_SERVER=(unix:.*)", started.stderr)
        assert where and Path(where[1].removeprefix("unix:")).stat().st_mode & 0o077 == 0
        again = kvgen("serve", "--detach", "-m", str(smollm2_path))
        assert (again.returncode, "a server runs there already" in again.stderr) == (1, True)
        text = kvgen("generate", PROMPT, *GREEDY, "--server", where[1]).stdout
        assert text == run("generate", PROMPT, *GREEDY, "-m", str(smollm2_path)).stdout
    finally:
        stopped = kvgen("serve", "--stop-running")
    assert (stopped.returncode, stopped.stdout) == (0, ""), stopped.stderr
    assert stopped.stderr.startswith("stopped the server")
    (log,) = tmp_path.rglob("serve.log")
    assert log.read_text().splitlines()[-1] == "requests in progress may end; Ctrl-C again to stop at once"
    gone = kvgen("serve", "--stop-running")
    assert (gone.returncode, len(gone.stderr.splitlines())) == (1, 1)


def test_a_runtime_folder_of_another_user_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Path:
        raise PermissionError("/tmp/runtime-0 is owned by uid 65534")  # as platformdirs does

    monkeypatch.setattr("kvgen.system.user_runtime_path", refuse)
    with pytest.raises(KvgenError, match="no folder for sockets: /tmp/runtime-0 is owned"):
        runtime_dir()


def test_the_variable_that_names_a_server_sets_no_option_of_another_meaning() -> None:
    commands: Any = get_command(app)
    names = {name: {parameter.name for parameter in command.params} for name, command in commands.commands.items()}
    assert {name for name in names if "server" in names[name]} == {"generate", "chat", "batch", "score"}
