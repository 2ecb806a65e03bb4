"""`kvgen batch`: rows in, results out, and nothing lost, doubled or torn whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from dataclasses import fields, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvgen
from kvgen import Batch, KvgenError, Request, Sampling, UsageError
from kvgen.pipeline.results import InOrder, ResultsFile
from kvgen.pipeline.rows import SAMPLING_FIELDS, InputRow, read_row, read_rows
from tests.odd_rows import odd_rows
from tests.program import KVGEN, run, run_on_terminal, start
from tests.sizes import examples

WORDS = ("red", "green", "blue", "stone", "river", "cloud")


@pytest.fixture
def tiny(tiny_llama) -> list[str]:
    """`batch` with a tiny model."""
    folder, _ = tiny_llama()
    return ["batch", "-m", str(folder), "-t", "0"]


def write_rows(path: Path, count: int) -> Path:
    rows = [{"id": f"row {n}", "prompt": f"the {WORDS[n % 6]} {n}", "max_tokens": 2 + n % 9} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results_of(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


# --- Rows ---------------------------------------------------------------------------------------------------------


def test_a_row_may_set_what_sampling_has() -> None:
    assert {field.name for field in fields(Sampling)} == SAMPLING_FIELDS


def test_rows_are_strings_prompts_or_conversations() -> None:
    lines = [
        b'"hello"\n',
        b"\n",
        b'{"prompt": "hello", "id": "a", "temperature": 0, "stop": "x", "logit_bias": {"3": -1}, "metadata": [1]}\n',
        b'{"messages": [{"role": "user", "content": "hi"}], "id": 7, "max_tokens": 3, "seed": 5}',
    ]
    first, second, third = read_rows(lines)
    defaults = Request((), Sampling(seed=40))
    assert (first.index, first.id, first.prompt, first.request(defaults).sampling.seed) == (0, 0, "hello", 40)
    assert (second.index, second.id, second.metadata) == (1, "a", [1])
    request = second.request(defaults)
    assert (request.sampling.temperature, request.stop, request.sampling.logit_bias) == (0, ("x",), {3: -1.0})
    assert request.sampling.seed == 41
    assert third.prompt == [{"role": "user", "content": "hi"}]
    assert third.request(defaults).max_tokens == 3
    assert third.request(defaults).sampling.seed == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "a row is a string, or an object"),
        (b'{"id": 1}', "give one of `prompt` and `messages`"),
        (b'{"prompt": "a", "messages": []}', "give one of"),
        (b'{"prompt": 3}', "`prompt` must be a string"),
        (b'{"messages": [{"role": "user"}]}', "`role` and `content`"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "must be strings"),
        (b'{"prompt": "a", "temprature": 1}', "unknown field 'temprature'"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature is 'hot'; it must be a number"),
        (b'{"prompt": "a", "temperature": true}', "temperature is True; it must be a number"),
        (b'{"prompt": "a", "top_k": 1.5}', "top_k is 1.5; it must be a whole number"),
        (b'{"prompt": "a", "top_p": 2}', "top_p is 2; it must be above 0"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number"),
        (b'{"prompt": "a", "id": 1.5}', "`id` must be a string or a whole number"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "`logit_bias` must map"),
        (b'{"prompt": "a", "stop": [1]}', "stop is [1]; it must be a string, or several"),
        (b"[" * 5000, "more than 100 levels"),
        (b'{"prompt": "a", "metadata": [1e400]}', "the number 1e400 is too large"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "it must be a finite number, 0 or more"),
        (b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}', "`logit_bias` must map token ids to numbers"),
        (
            b'{"prompt": "a", "logit_bias": {"1": 1' + b"0" * 400 + b"}}",
            "it must be token ids with numbers of at most 1e+06 in size",
        ),
        (b'{"prompt": "a", "regex": "\\ud800"}', "the regex is not valid Unicode"),
        (b'{"prompt": "a", "grammar": "\\ud800"}', "the grammar is not valid Unicode"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(line: bytes, message: str) -> None:
    row = read_row(3, line)
    assert row.index == 3
    assert message in str(row.error)


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: json.dumps({"prompt": text}).encode()))
@settings(max_examples=examples(300))
def test_any_line_is_a_row_or_says_why_not(line: bytes) -> None:
    row = read_row(0, line)
    assert isinstance(row, InputRow)
    assert row.error is None or row.error
    if row.error is None:
        row.request(Request(()))


# --- Results ------------------------------------------------------------------------------------------------------


@given(order=st.permutations(range(8)), done=st.sets(st.integers(0, 7)))
def test_in_order_writes_what_it_gets_in_order(order: list[int], done: set[int]) -> None:
    written: list[int] = []
    put = InOrder(lambda value: written.append(value["index"]), dict.fromkeys(done, ""))
    for index in order:
        if index not in done:
            put({"index": index})
    assert written == [index for index in range(8) if index not in done]


def result(index: int) -> dict[str, Any]:
    return {"index": index, "digest": f"d{index}", "text": "é\n" * index}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out"
    file = ResultsFile(path, resume=False)
    for index in range(3):
        file.write(result(index))
    file.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = ResultsFile(path, resume=True)
    assert again.done == {0: "d0", 1: "d1"}
    again.write(result(2))
    again.close()
    assert [value["index"] for value in results_of(path.read_text())] == [0, 1, 2]


def test_a_file_with_results_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("{}\n")
    with pytest.raises(UsageError, match="already exists; continue it with --resume"):
        ResultsFile(path, resume=False)
    assert path.read_text() == "{}\n"


@pytest.mark.parametrize("content", ["{}\n", "hello\n", '{"index": 0, "digest": "a"}\n{"index": 0, "digest": "a"}\n'])
def test_what_is_no_file_of_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out"
    path.write_text(content)
    with pytest.raises(UsageError, match="line"):
        ResultsFile(path, resume=True)
    assert path.read_text() == content


def test_a_line_that_cannot_be_written_whole_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ResultsFile(tmp_path / "out", resume=False)
    file.write(result(0))
    real = os.write

    def half(descriptor: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(KvgenError, match=r"No space left on device.*--resume"):
        file.write(result(9))
    assert results_of((tmp_path / "out").read_text()) == [result(0)]


# --- The command --------------------------------------------------------------------------------------------------


def test_each_row_gives_a_line_in_order(tiny: list[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", 20)
    tiny = [*tiny, "--seed", "1"]
    with rows.open() as file:
        piped = run(*tiny, stdin=file.fileno())
    assert piped.returncode == 0
    assert piped.stderr == ""
    found = results_of(piped.stdout)
    assert [value["id"] for value in found] == [f"row {n}" for n in range(20)]
    assert [value["completion_tokens"] for value in found] == [2 + n % 9 for n in range(20)]
    into_file = run(*tiny, str(rows), "-o", str(tmp_path / "out"), "--stats")
    assert into_file.stdout == ""
    assert "20 rows, 0 failed" in into_file.stderr
    assert (tmp_path / "out").read_text() == piped.stdout


def test_the_same_seed_gives_the_same_bytes(tiny: list[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", 12)
    options = [*tiny, str(rows), "-t", "1", "--seed", "3"]
    first, second = run(*options), run(*options, "--batch-size", "3")
    assert first.stdout == second.stdout
    assert [value["seed"] for value in results_of(first.stdout)] == list(range(3, 15))
    alone = run("generate", "-m", tiny[2], "-p", "the stone 3", "-n", "5", "-t", "1", "--seed", "6", "--json")
    assert json.loads(alone.stdout)["completion"] == results_of(first.stdout)[3]["completion"]


def test_a_bad_row_gives_a_line_with_its_error(tiny: list[str]) -> None:
    rows = '"good"\n{"id": "x", "promt": "a"}\nnonsense\n"fine"\n'
    found = run(*tiny, "--seed", "1", input=rows)
    assert found.returncode == 1
    assert found.stderr == "kvgen: error: 2 of 4 rows failed: see `error` in their results\n"
    values = results_of(found.stdout)
    assert ["error" in value for value in values] == [False, True, True, False]
    assert values[1]["id"] == "x"
    strict = run(*tiny, "--seed", "1", "--strict", input=rows)
    assert strict.returncode == 1
    assert "row 'x': " in strict.stderr
    assert results_of(strict.stdout) == values[:2]  # those before it are complete


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_row_ends_a_run_and_those_beside_odd_ones_are_what_they_are_alone(
    tiny: list[str], tmp_path: Path, count: int
) -> None:
    lines, plain = zip(*odd_rows(count, seed=count), strict=True)
    rows = tmp_path / "rows"
    rows.write_bytes(b"".join(line + b"\n" for line in lines))
    found = run(*tiny, str(rows), "-n", "8", "--seed", "1", "--batch-size", "16")
    assert (found.returncode, len(found.stderr.splitlines())) == (1, 1)
    values = results_of(found.stdout)
    assert [value["index"] for value in values] == list(range(count))
    assert not any("error" in value for value, expected in zip(values, plain, strict=True) if expected)
    loaded = kvgen.load(tiny[2])
    for value, line in zip(values, lines, strict=True):
        if "error" in value:
            assert value["error"]
            continue
        row = read_row(value["index"], line)
        request = row.request(Request((), Sampling(temperature=0, seed=1), 8), most_tokens=8)
        chunks = list(Batch(loaded).complete(replace(request, prompt=loaded.tokenizer.encode(row.prompt))))
        assert value["completion"] == "".join(chunk.text for chunk in chunks)
        assert (value["completion_tokens"], value["finish_reason"]) == (len(chunks), chunks[-1].finish_reason)


def test_a_file_of_plain_prompts_is_pointed_elsewhere(tiny: list[str]) -> None:
    found = run(*tiny, input="the red 1\nthe red 2\n")
    assert "none is JSON: for a file with one prompt per line, use kvgen generate --lines" in found.stderr
    assert "--lines" not in run(*tiny, "-n", "1", input='the red 1\n"the red 2"\n').stderr


def test_max_tokens_bounds_rows_where_it_is_given(tiny: list[str], tmp_path: Path) -> None:
    rows = '{"prompt": "a", "max_tokens": 5}\n{"prompt": "a", "max_tokens": 2}\n'
    for arguments, environment, counts in (
        ([], {}, [5, 2]),
        (["-n", "3"], {}, [3, 2]),
        ([], {"KVGEN_MAX_TOKENS": "4"}, [4, 2]),
    ):
        found = run(*tiny, *arguments, input=rows, env=os.environ | environment)
        assert [value["completion_tokens"] for value in results_of(found.stdout)] == counts


def test_unordered_results_are_the_same_ones(tiny: list[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", 12)
    command = [*tiny, str(rows), "--seed", "1"]
    ordered, unordered = results_of(run(*command).stdout), results_of(run(*command, "--unordered").stdout)
    assert unordered != ordered
    assert sorted(unordered, key=lambda value: value["index"]) == ordered


def test_resume_goes_on_and_checks_that_the_rows_are_the_same(tiny: list[str], tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows", 10), tmp_path / "out"
    assert run(*tiny, str(rows), "--seed", "1", "-o", str(out)).returncode == 0
    whole = out.read_text()
    out.write_text("".join(line + "\n" for line in whole.splitlines()[:4]) + '{"index": 4, "di')
    assert run(*tiny, str(rows), "-o", str(out)).returncode == 2
    resumed = run(*tiny, str(rows), "-o", str(out), "--resume", "--seed", "1", "--stats")
    assert resumed.returncode == 0
    assert "6 rows, 0 failed" in resumed.stderr
    assert out.read_text() == whole
    rows.write_text(rows.read_text().replace("red", "pink"))
    changed = run(*tiny, str(rows), "-o", str(out), "--resume", "--seed", "1")
    assert changed.returncode == 2
    assert "row 0 is not the one whose result is in" in changed.stderr


def test_resume_goes_on_with_the_model_and_settings_of_before_or_says_what_differs(
    tiny: list[str], tiny_llama, tmp_path: Path
) -> None:
    rows, out = write_rows(tmp_path / "rows", 8), tmp_path / "out"
    other, _ = tiny_llama(seed=1, name="other")
    assert run(*tiny, str(rows), "-o", str(out), "-t", "1").returncode == 0
    whole = out.read_text()
    half = "".join(line + "\n" for line in whole.splitlines()[:4])
    out.write_text(half)
    for arguments, message in (
        (["-m", str(other)], f'model is "{other}", was "{tiny[2]}"'),
        (["-n", "3"], "max_tokens is 3, was 256; max_tokens_bounds_rows is true, was false"),
        (["--seed", "5"], "seed is 5, was "),
        (["-t", "0.5", "--chat"], "chat is true, was false; temperature is 0.5, was 1.0"),
        (["--dtype", "bfloat16"], 'dtype is "bfloat16", was "auto"'),
        (["--regex", "a" * 200], 'constraint is {"kind": "regex", "text": "aaa'),
    ):
        refused = run(*tiny, str(rows), "-o", str(out), "--resume", "-t", "1", *arguments)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
        assert f"{out}: made with other settings: " in refused.stderr
        assert message in refused.stderr
        assert out.read_text() == half
    Path(tiny[2]).rename(tmp_path / "moved")
    resumed = run(*tiny, "-m", str(tmp_path / "moved"), str(rows), "-o", str(out), "--resume", "-t", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert out.read_text() == whole  # with the seed of before, which nobody chose
    (tmp_path / "out.run.json").unlink()
    unknown = run(*tiny, "-m", str(tmp_path / "moved"), str(rows), "-o", str(out), "--resume", "-t", "1")
    assert unknown.returncode == 2
    assert "the run record out.run.json, which --resume needs, is missing" in unknown.stderr


def test_resume_with_nothing_to_do_says_so(tiny: list[str], tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows", 3), tmp_path / "out"
    command = [*tiny, str(rows), "-o", str(out), "--resume"]
    first = run(*command)
    assert (first.returncode, first.stderr) == (0, "")
    whole = out.read_bytes()
    for more, note in ([], f"nothing to do: {out} has a result for every row\n"), (["-q"], ""):
        again = run(*command, *more)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", note)
        assert out.read_bytes() == whole


@pytest.mark.slow
def test_a_tokenizer_without_its_own_files_has_no_digest(smollm2_path: Path, tiny: list[str], tmp_path: Path) -> None:
    rows, out, record = write_rows(tmp_path / "rows", 2), tmp_path / "out", tmp_path / "out.run.json"
    command = ["batch", "-m", str(smollm2_path), str(rows), "-o", str(out), "-n", "1"]
    assert run(*command).returncode == 0
    recorded = json.loads(record.read_text())
    assert (recorded["tokenizer"], len(recorded["weights"])) == (None, 64)
    assert run(*command, "--resume").returncode == 0
    other = run(*command, "--resume", "--tokenizer", str(Path(tiny[2]) / "tokenizer.json"))
    assert other.returncode == 2
    assert re.search(r'made with other settings: tokenizer is "[0-9a-f]{64}", was null', other.stderr)
    assert run(*tiny, str(rows), "-o", str(tmp_path / "hf")).returncode == 0
    assert len(json.loads((tmp_path / "hf.run.json").read_text())["tokenizer"]) == 64


@pytest.mark.slow
def test_two_runs_do_not_write_to_one_file(tiny: list[str], tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows", 4), tmp_path / "out"
    command = [*tiny, "-o", str(out), "--resume", "--seed", "1"]
    with start(*command) as (stdin, _, first):
        stdin.write(rows.read_text())
        lines_in(out, 4, first)
        (tmp_path / "link").symlink_to(out)
        for path in (out, tmp_path / "link"):
            second = run(*tiny, str(rows), "-o", str(path), "--resume", "--seed", "1")
            assert (second.returncode, second.stderr) == (
                2,
                f"kvgen: error: {path}: another kvgen batch is writing to it\n",
            )
        stdin.close()
        first.join(60)
        assert first.exitcode == 0
    assert [value["index"] for value in results_of(out.read_text())] == list(range(4))


def test_rows_that_failed_are_reported_on_resume_and_completed_again_when_asked(
    tiny: list[str], tmp_path: Path
) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.write_text('"a"\n"b" "c"\n"d"\nnonsense\n')
    command = [*tiny, str(rows), "-o", str(out), "--seed", "1"]
    assert run(*command).returncode == 1
    before = out.read_text()
    for _ in range(2):
        again = run(*command, "--resume")
        assert again.returncode == 1
        assert again.stderr == (
            "kvgen: error: 2 of 4 rows failed: see `error` in their results; "
            "--resume --retry-errors completes them again\n"
        )
        assert out.read_text() == before
    rows.write_text('"a"\n"b"\n"d"\nnonsense\n')
    retried = run(*command, "--resume", "--retry-errors")
    assert retried.returncode == 1
    assert "1 of 4 rows failed" in retried.stderr
    found = results_of(out.read_text())
    assert [value["index"] for value in found] == [0, 2, 1, 3]
    assert ["error" in value for value in found] == [False, False, False, True]
    assert run(*command, "--retry-errors").returncode == 2


def lines_in(path: Path, least: int, process: ForkServerProcess) -> None:
    """Wait until so many results are there, or the process has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if path.exists() and path.read_bytes().count(b"\n") >= least:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("kills", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_without_a_lost_doubled_or_torn_row(
    tiny: list[str], tmp_path: Path, kills: int
) -> None:
    count = 100 + 100 * kills
    rows, out = write_rows(tmp_path / "rows", count), tmp_path / "out"
    command = [*tiny, str(rows), "-o", str(out), "--resume", "--seed", "1", "--batch-size", "4"]
    chance, killed = random.Random(0), 0
    for number in range(kills):
        with start(*command) as (_, _, process):
            if number % 2:  # at any time, while it starts too
                process.join(chance.uniform(0, 0.5))
            else:  # while it writes
                there = out.read_bytes().count(b"\n") if out.exists() else 0
                lines_in(out, there + chance.randint(1, 50), process)
        killed += process.exitcode == -signal.SIGKILL
    assert killed == kills
    assert run(*command).returncode == 0
    values = results_of(out.read_text())
    assert [value["id"] for value in values] == [f"row {n}" for n in range(count)]
    assert out.read_text() == run(*tiny, str(rows), "--seed", "1").stdout


@pytest.mark.parametrize("most", [400, pytest.param(8000, marks=pytest.mark.slow)])
def test_one_ctrl_c_lets_rows_under_way_end_and_a_second_one_stops(tiny_llama, tmp_path: Path, most: int) -> None:
    """most: tokens of a row; of the many, none comes to its end before the second Ctrl-C."""
    folder, _ = tiny_llama(max_position_embeddings=9000)
    rows, out = tmp_path / "rows", tmp_path / "out"
    counts = [10, 10, 10, *[most] * 400]
    rows.write_text("".join(json.dumps({"prompt": f"go {n}", "max_tokens": n_}) + "\n" for n, n_ in enumerate(counts)))
    command = ["batch", "-m", str(folder), "-t", "0", str(rows), "-o", str(out), "--batch-size", "4", "--stats"]
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stderr, start(*command, stderr=write_end) as (_, _, process):
        os.close(write_end)
        assert process.pid is not None
        lines_in(out, 3, process)
        os.kill(process.pid, signal.SIGINT)
        if most == 8000:
            while "again to stop" not in stderr.readline():
                pass
            os.kill(process.pid, signal.SIGINT)
        errors = stderr.read()
        process.join(120)
    assert process.exitcode == 130
    assert "Traceback" not in errors
    assert (" 0 failed" in errors) == (most == 400)  # the second one is not for saying goodbye
    found = results_of(out.read_text())
    assert [value["index"] for value in found] == list(range(len(found)))
    assert 3 <= len(found) < 400
    for value in found:
        assert value["completion_tokens"] == counts[value["index"]] or value["finish_reason"] == "eos"


def test_a_full_disk_loses_nothing(tiny: list[str], tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows", 30), tmp_path / "out"
    command = [*tiny, str(rows), "-o", str(out), "--resume", "--seed", "1"]
    limited = run(*command, limits={resource.RLIMIT_FSIZE: 2048})
    assert limited.returncode == 1
    assert limited.stderr.startswith(f"kvgen: error: {out}: cannot be written (File too large)")
    assert len(limited.stderr.splitlines()) == 1
    assert 1 <= len(results_of(out.read_text())) < 30
    assert run(*command).returncode == 0
    assert [value["index"] for value in results_of(out.read_text())] == list(range(30))


@pytest.mark.slow
def test_a_pipe_with_a_name_gets_all_rows_and_is_left_when_its_reader_leaves(tiny: list[str], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    few, many = write_rows(tmp_path / "few", 3), write_rows(tmp_path / "many", 400)
    with subprocess.Popen([*KVGEN, *tiny, str(few), "-o", str(pipe)]) as process:
        with pytest.raises(subprocess.TimeoutExpired):  # no reader yet
            process.wait(8)
        assert len(results_of(pipe.read_text())) == 3
        assert process.wait(60) == 0
    with subprocess.Popen([*KVGEN, *tiny, str(many), "-o", str(pipe)], stderr=subprocess.PIPE, text=True) as process:
        with pipe.open() as reader:
            reader.readline()
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, f"kvgen: error: {pipe}: cannot be written (Broken pipe)\n")


def test_there_is_nothing_to_resume_in_what_is_no_file(tiny: list[str], tmp_path: Path) -> None:
    result = run(*tiny, str(write_rows(tmp_path / "rows", 1)), "-o", os.devnull, "--resume")
    assert result.returncode == 2
    assert result.stderr == f"kvgen: error: --resume needs a file with results, and {os.devnull} is none\n"


def test_the_record_lies_beside_the_file_that_a_link_leads_to(tiny: list[str], tmp_path: Path) -> None:
    rows, out, link = write_rows(tmp_path / "rows", 3), tmp_path / "out", tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(out)
    assert run(*tiny, str(rows), "-o", str(link)).returncode == 0
    assert [path.name for path in link.parent.iterdir()] == ["link"]
    assert "nothing to do" in run(*tiny, str(rows), "-o", str(out), "--resume").stderr


def test_a_dash_is_stdout(tiny: list[str], tmp_path: Path) -> None:
    assert len(results_of(run(*tiny, str(write_rows(tmp_path / "rows", 3)), "-o", "-").stdout)) == 3


def test_a_reader_that_leaves_is_told_of_in_a_line(tiny: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_text("".join(json.dumps({"prompt": f"go {n}", "max_tokens": 60}) + "\n" for n in range(300)))
    with subprocess.Popen(["head", "-2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as head:
        assert head.stdin is not None
        left = run(*tiny, str(rows), "--batch-size", "4", stdout=head.stdin.fileno())
        shown, _ = head.communicate()
    assert left.returncode == 0
    assert len(results_of(shown)) == 2
    assert len(left.stderr.splitlines()) == 1
    assert left.stderr.startswith("stdout was closed after ")


def test_on_a_terminal_there_is_a_bar_with_a_rate_and_lines_are_plain(tiny: list[str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", 5)
    code, shown = run_on_terminal(*tiny, str(rows), "-o", str(tmp_path / "out"))
    assert code == 0
    assert "5/5" in shown and "rows/s" in shown and "tok/s" in shown and "━" in shown
    code, shown = run_on_terminal(*tiny, str(rows), "-o", str(tmp_path / "narrow"), environment={"COLUMNS": "20"})
    assert "5/5" in shown and "…" not in shown and "━" not in shown
    code, shown = run_on_terminal(*tiny, str(rows), "-q")
    assert code == 0
    assert len([line for line in shown.splitlines() if line.startswith('{"index"')]) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--resume"], 2, "--resume needs --output"),
        (["/nowhere.jsonl"], 1, "/nowhere.jsonl: cannot be read"),
        (["--max-cache-memory", "lots"], 2, "'lots' is not a size"),
        (["-o", "/nowhere/out"], 1, "/nowhere/out: cannot be written"),
        (["--temperature", "-1"], 2, "temperature is -1"),
    ],
)
def test_wrong_usage_is_one_line(tiny: list[str], arguments: list[str], code: int, message: str) -> None:
    found = run(*tiny, *arguments, input='"x"\n')
    assert found.returncode == code
    assert found.stdout == ""
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_without_input_nothing_happens(tiny: list[str]) -> None:
    empty = run(*tiny, input="")
    assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_closed_stdin_is_told(tiny: list[str]) -> None:
    closed = subprocess.run(["bash", "-c", f"{' '.join([*KVGEN, *tiny])} <&-"], capture_output=True, text=True)
    assert closed.returncode == 2
    assert closed.stderr == "kvgen: error: no rows: give a FILE, or pipe them in\n"


def test_the_prompt_cache_serves_rows(tiny: list[str], tmp_path: Path) -> None:
    rows, cache = write_rows(tmp_path / "rows", 3), tmp_path / "cache"
    first = run(*tiny, str(rows), "--prompt-cache", str(cache), "--seed", "1")
    assert cache.exists()
    assert run(*tiny, str(rows), "--prompt-cache", str(cache), "--seed", "1").stdout == first.stdout


def test_prompts_of_the_repository_run(smollm2_path: Path) -> None:
    prompts = Path(__file__).parent.parent / "prompts" / "mixed.jsonl"
    found = run("batch", str(prompts), "-t", "0", "-n", "12")
    assert found.returncode == 0
    answers = {value["id"]: value["completion"] for value in results_of(found.stdout)}
    assert answers["story"] == " the city of Nova Haven was a thriving metropolis, with towering"
    assert answers["question"] == "The capital of Japan is Tokyo."
