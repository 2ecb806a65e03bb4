"""The command line as its users have it: real processes, pipes, signals and a pseudo-terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvgen.cli.prompts import has_piped_text
from tests.program import KVGEN, run, run_on_terminal, start
from tests.sizes import first

GREEDY = ["-t", "0", "-n", "8"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tiny(tiny_llama) -> list[str]:
    """`generate` with a tiny model."""
    folder, _ = tiny_llama()
    return ["generate", "-m", str(folder), *GREEDY]


# --- The main job ------------------------------------------------------------------------------------------------


def test_the_default_model_tells_its_story(smollm2_path: Path) -> None:
    result = run("generate", "-p", "Once upon a time,", "--temperature", "0", "--max-tokens", "24")
    assert result.returncode == 0
    assert result.stdout == (
        " the city of Nova Haven was a thriving metropolis, with towering skyscrapers and bustling streets. "
        "But as the years went by,\n"
    )
    assert result.stderr == ""


def test_the_default_model_answers_and_stops(smollm2_path: Path) -> None:
    result = run("generate", "--chat", "-p", "What is the capital of Japan?", "--temperature", "0", "--json")
    answer = json.loads(result.stdout)
    assert answer["completion"] == "The capital of Japan is Tokyo."
    assert answer["finish_reason"] == "eos"


# --- Where prompts come from -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["-p", "abc"], None, "abc"),
        (["-p", "abc"], "piped\n", "piped\nabc"),
        (["-p", "abc"], "", "abc"),
        (["abc"], None, "abc"),
        (["abc"], "piped", "piped\nabc"),
        (["-f", "{file}", "-p", "and more"], "not read", "in a file\nand more"),
        (["-p", "-"], "from stdin\n", "from stdin"),
        (["-f", "-"], "from stdin\r\n", "from stdin"),
        ([], "piped\n\n", "piped\n"),
        (["-f", "{file}"], None, "in a file"),
        (["-f", "{file}", "-p", "and more"], None, "in a file\nand more"),
        (["-f", "-", "-p", "and more"], "piped\n", "piped\nand more"),
    ],
)
def test_prompts_come_from_where_the_options_say(tiny, tmp_path: Path, arguments, stdin, prompt: str) -> None:
    (tmp_path / "prompt.txt").write_text("in a file\n")
    arguments = [argument.format(file=tmp_path / "prompt.txt") for argument in arguments]
    options = {} if stdin is None else {"input": stdin}
    result = run(*tiny, "--json", *arguments, **options)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["prompt"] == prompt


def test_what_is_piped_in_beside_a_prompt_is_said(tiny) -> None:
    assert "stdin, 5 characters, goes before the prompt" in run(*tiny, "-p", "abc", input="piped").stderr
    for result in (run(*tiny, "-p", "abc", "-q", input="piped"), run(*tiny, "-p", "abc", input="")):
        assert (result.returncode, result.stderr) == (0, "")


def test_an_idle_pipe_is_given_up_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()  # open and silent, as a script's stdin can be
    try:
        with os.fdopen(read_end) as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            said: list[str] = []
            assert not has_piped_text(said.append, timeout=0.1)
            assert ["waiting for stdin" in said[0], "stayed silent for 0.1 s" in said[1]] == [True, True]
            os.write(write_end, b"x")
            assert has_piped_text(said.append, timeout=0.1)
            assert len(said) == 2
    finally:
        os.close(write_end)


@pytest.mark.slow
def test_a_prompt_goes_on_without_an_idle_pipe(tiny) -> None:
    read_end, write_end = os.pipe()
    try:
        result = run(*tiny, "-p", "abc", "--json", stdin=read_end)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (result.returncode, json.loads(result.stdout)["prompt"]) == (0, "abc")


@pytest.mark.slow
def test_a_loop_keeps_the_file_that_it_reads(tiny, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    loop = 'while read -r line; do "$@" --json -p "$line"; done < "$FILE"'
    result = subprocess.run(
        ["bash", "-c", loop, "bash", *KVGEN, *tiny],
        env={**os.environ, "FILE": str(tmp_path / "prompts.txt")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["one", "two", "three"]
    # At the third prompt, nothing of the file is left.
    assert result.stderr.count("ignoring stdin, a file that another program is reading") == 2


def test_no_limit_of_tokens_is_that_of_the_context(tiny) -> None:
    value = json.loads(run(*tiny, "-n", "-1", "-p", "abc", "--json", "--logit-bias", "1=-100").stdout)
    assert (value["finish_reason"], value["prompt_tokens"] + value["completion_tokens"]) == ("context", 512)


def test_lines_are_prompts_and_share_what_they_share(tiny) -> None:
    result = run(*tiny, "--lines", "--json", input="the same start\nthe same start, and more\n")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["the same start", "the same start, and more"]
    alone = json.loads(run(*tiny, "--json", "-p", "the same start, and more").stdout)
    assert rows[1]["completion_ids"] == alone["completion_ids"]
    assert rows[1]["positions_computed"] < alone["positions_computed"]


def test_each_line_is_answered_before_the_next_is_read(tiny) -> None:
    with start(*tiny, "--lines", "--json") as (stdin, stdout, process):
        for prompt in ("one", "two"):
            stdin.write(f"{prompt}\n")
            assert json.loads(stdout.readline())["prompt"] == prompt
        stdin.close()
        process.join(30)
        assert process.exitcode == 0


# --- Wrong usage and errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--no-such-option"], 2, "--no-such-option"),
        (["-p", ""], 2, "prompt is empty"),
        (["-f", "/dev/null"], 2, "prompt is empty"),
        ([], 2, "prompt is empty"),  # stdin is /dev/null
        (["-p", "-", "-f", "-"], 2, "--prompt -"),
        (["-p", "x", "--lines"], 2, "--lines"),
        (["-p", "x", "--system", "y"], 2, "--system"),
        (["-p", "x", "--logprobs", "2"], 2, "--logprobs"),
        (["-p", "x", "--max-tokens", "0"], 2, "--max-tokens"),
        (["x", "-p", "y"], 2, "give the prompt once"),
        (["-p", "x", "--temp", "0"], 2, "no option --temp: use --temperature"),
        (["-p", "x", "--ctx-size", "9"], 2, "no option --ctx-size: use --max-context"),
        (["-p", "x", "--n-predict", "9"], 2, "no option --n-predict: use --max-tokens"),
        (["-p", "x", "--profile", "y"], 2, "kvgen --profile NAME generate"),
        (["-p", "x", "-m", "model.py"], 2, "as in model.py:factory"),
        (["-p", "x", "--top-p", "1.5"], 2, "top_p is 1.5"),
        (["-p", "x", "--dtype", "float8"], 2, "--dtype"),
        (["-p", "x", "--device", "toaster"], 2, "'toaster' cannot be used on this machine; it has auto, "),
        (["-p", "5 384", "--ids"], 2, "'384' is not a token id of this model: give integers from 0 to 383"),
        (["-p", "five", "--ids"], 2, "'five' is not a token id"),
        (["-p", "x", "--logit-bias", "a=b"], 2, "--logit-bias"),
        (["-p", "x", "--threads", "100000"], 2, "--threads"),
        (["-p", "x", "--device", "meta"], 2, "meta"),
        (["-p", "x", "-m", "a" * 5000], 1, "not a valid path ("),
        (["-p", "x", "-m", "~nosuchuser/x"], 1, "not a valid path ("),
        (["-p", "x", "--chat"], 2, "no chat template"),
        (["-p", "abc " * 600], 2, "context has room for 512"),
        (["-f", "/no/such/file"], 1, "/no/such/file"),
        (["-f", "/"], 1, "/: cannot be read"),
        (["-p", "x", "-m", "/no/such/model.gguf"], 1, "/no/such/model.gguf"),
        (["-p", "x", "-m", "no-such-name"], 1, "smollm2"),
        (["-p", b"\xff".decode(errors="surrogateescape")], 2, "not valid Unicode"),
    ],
    ids=str,
)
def test_errors_are_one_line_on_stderr(tiny, arguments: list[str], code: int, message: str) -> None:
    result = run(*tiny, *arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith("kvgen: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_text_that_is_not_utf8_is_refused(tiny, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    result = run(*tiny, "-f", str(tmp_path / "latin.txt"))
    assert result.returncode == 2
    assert "not UTF-8 text (byte 3)" in result.stderr


def test_blank_lines_are_no_prompts_and_a_bad_one_does_not_end_the_others(tiny, tmp_path: Path) -> None:
    blank = run(*tiny, "--lines", "--json", input="one\n\n  \ntwo\n\n")
    assert (blank.returncode, blank.stderr) == (0, "")
    assert [json.loads(line)["prompt"] for line in blank.stdout.splitlines()] == ["one", "two"]
    lines = tmp_path / "lines"
    lines.write_bytes(f"one\n{'abc ' * 600}\ntwo\n".encode() + b"caf\xe9\nthree")
    with lines.open() as file:
        found = run(*tiny, "--lines", "--json", stdin=file.fileno())
    assert found.returncode == 1
    assert found.stderr == "kvgen: error: 2 of 5 lines could not be completed\n"
    values = [json.loads(line) for line in found.stdout.splitlines()]
    assert [value["prompt"][:5] for value in values] == ["one", "abc a", "two", "caf\ufffd", "three"]
    errors = [value["error"] for value in values if "error" in value]
    assert errors[0].startswith("stdin, line 2: the prompt has ")
    assert errors[1] == "stdin, line 4: not UTF-8 text (byte 3)"
    with lines.open() as file:
        text = run(*tiny, "--lines", stdin=file.fileno())
    assert text.returncode == 1
    assert [line.partition(" line ")[0] for line in text.stderr.splitlines()] == [
        "kvgen: error: stdin,",
        "kvgen: error: stdin,",
        "kvgen: error: 2 of 5 lines could not be completed",
    ]


@pytest.mark.parametrize("arguments", first(1, ["", "--lines", "-p x", "-f -"]))
def test_a_prompt_that_no_context_holds_is_refused_before_memory_ends(tiny, arguments: str) -> None:
    endless = "head -c 70000000 /dev/zero | tr '\\0' a" if arguments == "--lines" else "yes ''"
    with subprocess.Popen(["sh", "-c", endless], stdout=subprocess.PIPE) as source:
        assert source.stdout is not None
        limits = {resource.RLIMIT_AS: 8_000_000 * 1024}
        result = run(*tiny, *arguments.split(), stdin=source.stdout.fileno(), limits=limits)
    assert result.stdout == ""
    assert result.returncode == (1 if arguments == "--lines" else 2)
    first = result.stderr.splitlines()[0]
    assert first.startswith("kvgen: error: stdin") and first.endswith(
        "longer than 64 MB, more than any model's context holds"
    )


def test_a_closed_stdin_is_no_prompt(tiny) -> None:
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *KVGEN, *tiny], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "no prompt" in result.stderr


# --- Help --------------------------------------------------------------------------------------------------------


def test_help_and_import_do_not_load_torch() -> None:
    for code in (
        "import kvgen",
        "import kvgen.cli",
        "import sys; sys.argv = ['kvgen', 'generate', '--help']; import kvgen.__main__ as m; m.main()",
    ):
        wrapped = f"import atexit, sys\natexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)))\n{code}"
        result = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True)
        assert result.stderr == "False"


def test_generate_loads_only_what_it_needs(tiny) -> None:
    code = """
import atexit, sys, kvgen.__main__ as m
in_vain = {"rich.markdown", "kvgen.comparison", "kvgen.cli.chat"}
atexit.register(lambda: print(sorted(in_vain & sys.modules.keys()), file=sys.stderr))
m.main()
"""
    arguments = [*tiny, "-p", "Hello", "--max-tokens", "1"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.stderr == "[]\n"


def test_bare_command_shows_help_and_version_is_told() -> None:
    result = run()
    assert result.returncode == 0
    for name in ("generate", "serve", "models", "cache"):
        assert f"│ {name} " in result.stdout
    assert re.fullmatch(r"kvgen \d+\.\d+\.\d+\n", run("--version").stdout)


def test_help_shows_groups_and_examples() -> None:
    text = run("generate", "--help", env={**os.environ, "COLUMNS": "120"}).stdout
    groups = ("Prompt", "Model", "Sampling", "When to stop", "Cache and speed", "Output")
    for part in (*groups, "Examples:", 'kvgen generate "Once upon'):
        assert part in text
    assert "\x1b" not in text


def test_the_shell_can_complete_commands_and_options() -> None:
    for words, completion in (("kvgen gen", "generate"), ("kvgen generate --max", "--max-tokens")):
        asked = {"_KVGEN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert completion in run(env={**os.environ, **asked}).stdout


# --- Output ------------------------------------------------------------------------------------------------------


def test_stats_go_to_stderr_and_quiet_silences_them(tiny) -> None:
    result = run(*tiny, "-p", "abc", "--stats", "--seed", "7")
    assert result.stderr.startswith("cache: ")
    for part in ("8 generated (length)", "first token", "prefill", "decode", "reused", "computed", "seed 7", "float32"):
        assert part in result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert run(*tiny, "-p", "abc", "--stats", "--quiet").stderr == ""


def test_prompts_side_by_side_are_timed_as_their_tokens_come(tiny) -> None:
    rows = run(*tiny, "-n", "60", "--lines", "--json", input="the first\nthe second\nthe third\n").stdout.splitlines()
    first, *others = (json.loads(row)["decode_tokens_per_second"] for row in rows)
    assert all(rate < 10 * first for rate in others)


def test_what_is_verified_says_what_computes(tiny) -> None:
    engine = run(*tiny, "-p", "a", "-n", "1", "--stats").stderr.split()[-1]
    verified = run(*tiny, "-p", "a", "-n", "1", "--stats", "--verify-cache").stderr
    assert verified.split()[-1] == engine
    assert "of unknown size" not in verified
    assert verified.splitlines()[1].startswith("1 prompt token, 1 generated")


def test_json_holds_everything(tiny) -> None:
    result = run(*tiny, "-p", "abc", "--json", "--logprobs", "2", "--seed", "7")
    value = json.loads(result.stdout)
    assert value["prompt"] == "abc"
    assert value["seed"] == 7
    assert value["finish_reason"] == "length"
    assert value["prompt_tokens"] == len(value["prompt_ids"])
    assert value["completion_tokens"] == len(value["completion_ids"]) == len(value["logprobs"]) == 8
    assert value["positions_computed"] == value["prompt_tokens"] + 7
    first = value["logprobs"][0]
    assert first["id"] == first["top"][0]["id"]
    assert first["logprob"] == first["top"][0]["logprob"] < 0
    assert len(first["top"]) == 2
    plain = run(*tiny, "-p", "abc").stdout
    assert plain.rstrip("\n") == value["completion"].rstrip("\n")


def test_no_cache_gives_the_same_text_and_computes_everything(tiny) -> None:
    cached = json.loads(run(*tiny, "-p", "abc", "--json").stdout)
    uncached = json.loads(run(*tiny, "-p", "abc", "--json", "--no-cache").stdout)
    assert cached["completion_ids"] == uncached["completion_ids"]
    n = cached["prompt_tokens"]
    assert uncached["positions_computed"] == sum(range(n, n + 8))
    assert uncached["positions_reused"] == 0


def test_the_same_seed_gives_the_same_text(tiny) -> None:
    texts = [run(*tiny, "-p", "abc", "-t", "1", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_special_tokens_in_a_prompt_are_text_unless_asked(tiny) -> None:
    as_text = json.loads(run(*tiny, "-p", "a</s>", "--json").stdout)
    as_token = json.loads(run(*tiny, "-p", "a</s>", "--json", "--parse-special").stdout)
    assert 1 not in as_text["prompt_ids"]
    assert as_token["prompt_ids"][-1] == 1


def test_the_environment_names_the_model(tiny) -> None:
    environment = {**os.environ, "KVGEN_MODEL": tiny[2]}
    assert run("generate", *GREEDY, "-p", "abc", env=environment).stdout == run(*tiny, "-p", "abc").stdout


# --- Pipes and signals -------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_ends_it_quietly(tiny, tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as errors:
        command = start(*tiny, "-n", "400", "-t", "1", "--seed", "3", "-p", "abc", stderr=errors.fileno())
        with command as (stdin, stdout, process):
            stdin.close()
            os.read(stdout.fileno(), 1)
            stdout.close()
            process.join(60)
            assert process.exitcode == 0
    assert (tmp_path / "stderr").read_bytes() == b""


def test_whole_lines_reach_a_pipe_as_they_are_made_and_ctrl_c_keeps_the_rest(
    smollm2_path: Path, tmp_path: Path
) -> None:
    regex = r"(one two three four\n){900}"
    with (tmp_path / "stderr").open("w") as errors:
        command = start(*("generate", "-p", "A list:", "-t", "0", "-n", "-1", "--regex", regex), stderr=errors.fileno())
        with command as (stdin, stdout, process):
            stdin.close()
            parts = [os.read(stdout.fileno(), 1000) for _ in range(5)]
            assert all(part and not part.replace(b"one two three four\n", b"") for part in parts)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGINT)
            rest = stdout.read()
            process.join(60)
            assert process.exitcode == 130
    assert rest.endswith("\n") or not rest
    assert (tmp_path / "stderr").read_bytes() == b""


@pytest.mark.slow
def test_ctrl_c_keeps_the_line_that_is_not_ended(smollm2_path: Path) -> None:
    with subprocess.Popen(
        [*KVGEN, "generate", "-p", "Once upon a time,", "-t", "0", "-n", "-1", "--regex", r"x\n(a b ){3000}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout and process.stderr
        assert os.read(process.stdout.fileno(), 1000) == b"x\n"
        assert not select.select([process.stdout], [], [], 1)[0]
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert len(rest) > 4 and rest[-1:] == b"\n" and (b"a b " * 3000).startswith(rest[:-1])
        assert process.wait(60) == 130


@pytest.mark.slow
def test_a_stats_reader_that_leaves_costs_no_output(tiny) -> None:
    command = 'seq 1 6 | sed "s/$/ word/" | "$@" --lines --json --stats 2> >(true)'
    result = subprocess.run(["bash", "-c", command, "bash", *KVGEN, *tiny], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["generate", "-p", "x"], ["--help"], ["--version"]], ids=str)
def test_a_full_disk_is_one_line(tiny, arguments: list[str]) -> None:
    given = [*tiny, "-p", "x"] if arguments[0] == "generate" else arguments
    with Path("/dev/full").open("w") as full:
        result = run(*given, stdout=full.fileno())
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "cannot be written" in result.stderr


def test_a_closed_stdout_is_one_line(tiny) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *KVGEN, *tiny, "-p", "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == "kvgen: error: stdout is closed: there is nowhere to write to\n"


def test_a_stdout_that_is_open_to_read_only_is_one_line(tiny) -> None:
    with Path(os.devnull).open() as unwritable:
        result = run(*tiny, "-p", "x", stdout=unwritable.fileno())
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "stdout cannot be written" in result.stderr


@pytest.mark.parametrize("option", ["--prompt-cache", "--tokenizer", "--adapter"])
def test_a_path_that_the_system_refuses_is_one_line(tiny, option: str) -> None:
    result = run(*tiny, "-p", "x", option, 300 * "x")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"kvgen: error: {300 * 'x'}: cannot be used (File name too long)\n"


def test_a_tokenizer_that_is_not_there_is_named(tiny, tmp_path: Path) -> None:
    result = run(*tiny, "-p", "x", "--tokenizer", str(tmp_path / "no.json"))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"kvgen: error: --tokenizer {tmp_path}/no.json: no such file\n"


@pytest.mark.parametrize("variable", ["KVGEN_CACHE_DIR", "KVGEN_CONFIG"])
def test_a_variable_that_names_no_user_is_one_line(variable: str) -> None:
    result = run("models", env={**os.environ, variable: "~nobody-of-this-name/x"})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"kvgen: error: {variable} is '~nobody-of-this-name/x': there is no such user\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_not_utf8_reaches_a_file_as_it_is(smollm2_path: Path, tmp_path: Path) -> None:
    link = tmp_path / "\udcff.gguf"
    link.symlink_to(smollm2_path)
    with (tmp_path / "shown").open("wb") as shown:
        result = run("inspect", str(link), stdout=shown.fileno())
    assert result.returncode == 0, result.stderr
    assert b"/\xff.gguf" in (tmp_path / "shown").read_bytes()


@pytest.mark.slow
def test_results_reach_a_file_when_stdout_is_closed(tiny, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *KVGEN, "batch", *tiny[1:], str(rows), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, len(out.read_text().splitlines())) == (0, 1), result.stderr


def test_text_is_utf8_in_a_pipe_whatever_the_locale(hostile) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run([*KVGEN, *hostile], capture_output=True, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "\u202e" in result.stdout.decode("utf-8")


def test_an_environment_that_forces_colour_changes_no_pipe(tiny) -> None:
    plain = run(*tiny, "-p", "abc", "--stats", "--seed", "1")
    forced = run(
        *tiny, "-p", "abc", "--stats", "--seed", "1", env={**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
    )
    assert forced.stdout == plain.stdout
    assert "\x1b" not in forced.stderr


@pytest.mark.parametrize("delay", first(2, [0.25, 0.8, 0.05, 0.15, 0.4]))
def test_ctrl_c_is_heard_while_it_starts(smollm2_path: Path, delay: float) -> None:
    """From when Python itself has started, which takes as long as it takes and dies of the signal in its own ways."""
    code = "from kvgen.__main__ import main; print('up', flush=True); main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "generate", "-p", "Once upon a time,", "-n", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout and process.stdout.readline() == b"up\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in errors


# --- On a terminal -----------------------------------------------------------------------------------------------


def test_a_script_finds_all_texts_of_one_write(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("def make():\n    input('one two three')\n")
    arguments = ("generate", "-m", f"{tmp_path}/model.py:make", "--tokenizer", "bytes", "-p", "x")
    code, _ = run_on_terminal(*arguments, script=[("one", ""), ("two", ""), ("three", "\r")])
    assert code == 2


def test_a_terminal_without_a_prompt_is_wrong_usage(tiny) -> None:
    code, output = run_on_terminal(*tiny)
    assert code == 2
    assert "no prompt" in output


def test_a_terminal_shows_the_same_text_as_a_pipe(smollm2_path: Path) -> None:
    arguments = ["generate", "-p", "Once upon a time,", "-t", "0", "-n", "40"]
    code, output = run_on_terminal(*arguments, "--quiet")
    assert code == 0
    assert output.replace("\r\n", "\n") == run(*arguments).stdout


def test_what_max_context_drops_is_counted_and_said_once(tiny, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("Hello\nHello again\n")
    arguments = [*tiny, "--lines", "-f", str(tmp_path / "prompts"), "-n", "12", "--json"]
    short = [*arguments, "--max-context", "8", "--keep-first", "0"]
    result = run(*short, "--stats")
    counts = [json.loads(line)["dropped_tokens"] for line in result.stdout.splitlines()]
    assert len(counts) == 2 and min(counts) > 0
    assert all(f"--max-context: {count} tokens dropped" in result.stderr for count in counts)
    said = "--max-context: the middle"
    assert said not in result.stderr
    assert [run_on_terminal(*each)[1].count(said) for each in (arguments, short, [*short, "--quiet"])] == [0, 1, 0]


@pytest.mark.slow
def test_a_terminal_is_told_of_a_chat_template_that_is_not_used(smollm2_path: Path) -> None:
    arguments = ["generate", "-p", "Hi", "-t", "0", "-n", "2"]
    assert "this model has a chat template: --chat" in run_on_terminal(*arguments)[1]
    assert "chat template" not in run_on_terminal(*arguments, "--chat")[1]
    assert run(*arguments).stderr == ""


def test_ctrl_c_on_a_terminal_keeps_the_text_and_exits_130(smollm2_path: Path) -> None:
    code, output = run_on_terminal(
        "generate", "-p", "Once upon a time,", "-t", "0", "-n", "2000", interrupt_after="city"
    )
    assert code == 130
    assert " the city" in output
    assert "Traceback" not in output
    assert output.endswith("\n")


@pytest.fixture
def hostile(tiny_llama) -> list[str]:
    """`generate` with a model whose every token is an escape sequence, a control character or Rich markup."""
    folder, _ = tiny_llama()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    evil = ["\x1b[31m", "\x1b]52;c;ZXZpbA==\x07", "[bold red]x[/]", "\x9b2J", "\u202eevil", "\r", "\x7f"]
    vocabulary = {f"{evil[id_ % len(evil)]}{'' if id_ < len(evil) else id_}": id_ for id_ in range(2, 384)}
    tokenizer["model"] = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, **vocabulary}, "unk_token": "<s>"}
    tokenizer["pre_tokenizer"] = None
    tokenizer["decoder"] = {"type": "Fuse"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return ["generate", "-m", str(folder), "-n", "60", "-t", "1.5", "--seed", "1", "-p", "\r"]


def test_model_text_cannot_steer_a_terminal(hostile) -> None:
    code, output = run_on_terminal(*hostile)
    assert code == 0
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", output.replace("\r\n", "\n"))
    assert "\\x1b[31m" in output
    assert "[bold red]x[/]" in output
    assert "\\u202e" in output


def test_model_text_in_json_cannot_steer_a_terminal(hostile) -> None:
    code, output = run_on_terminal(*hostile, "--json")
    assert code == 0
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", output.replace("\r\n", "\n"))
    assert "\x1b[31m" in json.loads(output)["completion"]


def test_raw_and_pipes_get_the_text_as_it_is(hostile) -> None:
    _, output = run_on_terminal(*hostile, "--raw")
    assert "\x1b[31m" in output
    assert "\x1b[31m" in run(*hostile).stdout


def test_error_messages_cannot_steer_a_terminal() -> None:
    code, output = run_on_terminal("generate", "-p", "x", "-m", "\x1b[31mred")
    assert code == 1
    assert "\x1b" not in output


def test_a_chat_template_file_takes_the_place_of_the_checkpoints(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    template = tmp_path / "template.jinja"
    template.write_text("Q: {{ messages[0].content }} A:\n")
    arguments = ["generate", "-m", str(folder), *GREEDY, "-p", "x", "--json"]
    chatted = json.loads(run(*arguments, "--chat", "--chat-template", str(template)).stdout)
    assert chatted["prompt_ids"] == json.loads(run(*[*arguments[:-2], "Q: x A:", "--json"]).stdout)["prompt_ids"]
    assert run(*arguments, "--chat-template", str(template)).stderr.startswith(
        "kvgen: error: --chat-template goes with"
    )
    missing = run(*arguments, "--chat", "--chat-template", str(tmp_path / "none"))
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "none: cannot be read" in missing.stderr


@pytest.mark.parametrize("command", first(1, ["generate", "chat"]))
def test_a_long_prompt_shows_how_far_it_is_and_can_be_interrupted(smollm2_path: Path, command: str) -> None:
    text = "the city of Nova Haven was a thriving metropolis with towering skyscrapers, " * 400
    code, output = run_on_terminal(command, "-p", text, "-n", "3", interrupt_after="reading the prompt")
    assert code == 130
    assert output.rstrip().endswith("\x1b[2K")  # the bar is taken away, and nothing has come
    assert re.search(r"[1-9]\d*/[56]\d\d\d", output)


@pytest.mark.parametrize("shown", ["row_progress(3, model, quiet=False)", "status('comparing', model, quiet=False)"])
def test_batch_and_compare_show_how_much_of_a_long_prompt_is_read(shown: str) -> None:
    program = (
        "import time; from types import SimpleNamespace; from kvgen.cli.render import row_progress, status\n"
        "told = []; model = SimpleNamespace(watch=told.append)\n"
        f"with {shown}:\n told[0](512, 2048); time.sleep(0.5)\n"
    )
    terminal, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment, check=True)
    os.set_blocking(terminal, False)
    assert b"(reading 2,048 tokens: 25 %)" in os.read(terminal, 10000)
