"""`kvgen compare`, `kvgen convert` and `generate --verify-cache` as real processes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kvgen.comparison.junit import as_junit
from tests.families import make_checkpoint
from tests.program import KVGEN, run, run_on_terminal

MODEL_FILE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.faults import SmallDecoder

def right():
    return SmallDecoder()

def wrong():
    return SmallDecoder("positions restart at 0")

def nothing():
    return 3

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(MODEL_FILE)
    return str(path)


def compare(*arguments: str, **options: Any) -> Any:
    return run("compare", *arguments, "--ids", "-p", "5 17 3 8 40 2", "-n", "12", **options)


def test_the_verdict_comes_first_and_decides_the_exit_code(model_file: str) -> None:
    right = compare("-m", f"{model_file}:right")
    assert right.returncode == 0, right.stderr
    assert right.stdout.splitlines()[0] == "full-sequence: equivalent"
    assert "\x1b" not in right.stdout
    wrong = compare("-m", f"{model_file}:wrong")
    assert wrong.returncode == 1
    assert wrong.stdout.splitlines()[0] == "full-sequence: different"
    assert "position 0" in " ".join(wrong.stdout.split())
    assert wrong.stderr == ""


def test_a_model_that_cannot_be_made_says_where(model_file: str) -> None:
    place = f"model.py, line {MODEL_FILE[: MODEL_FILE.index('raise')].count(chr(10)) + 1}"
    result = compare("-m", f"{model_file}:broken")
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert f"RuntimeError: no weights here ({place})" in result.stderr
    shown = run("--traceback", "compare", "-m", f"{model_file}:broken", "--ids", "-p", "5").stderr
    assert "Traceback" in shown and "in broken" in shown
    assert shown.splitlines()[-1].startswith("kvgen: error: ")


@pytest.mark.slow  # `kvgen compare --wrong-pattern` of the README is run
def test_wrong_patterns_do_not_change_the_exit_code(smollm2_path: Path) -> None:
    result = run("compare", "--wrong-pattern", "-n", "8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("full-sequence: equivalent   last-token: different\n")
    text = " ".join(result.stdout.split())
    for part in ("The position offset is lost", "Instead: Pass the whole sequence", "the city of Nova Haven"):
        assert part in text


def test_json_has_the_same_numbers_for_several_prompts(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    (tmp_path / "prompts.txt").write_text("one\n\ntwo and more\n")
    result = run(
        "compare",
        "-m",
        str(folder),
        "-f",
        str(tmp_path / "prompts.txt"),
        "-n",
        "6",
        "--pattern",
        "last-token",
        "--json",
    )
    report = json.loads(result.stdout)
    assert report["acceptable"] is True
    assert [data["prompt"] for data in report["comparisons"]] == ["one", "two and more"]
    assert [row["verdict"] for row in report["comparisons"][0]["patterns"]] == ["equivalent", "equivalent", "different"]


def test_a_text_is_forced_on_every_pattern(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    result = run("compare", "-m", str(folder), "--text", str(tmp_path / "text.txt"), "--json")
    data = json.loads(result.stdout)["comparisons"][0]
    assert (data["prompt"] + data["text"]).startswith("The quick brown fox")


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_width_cuts_a_verdict(tiny_llama, columns: str) -> None:
    folder, _ = tiny_llama()
    patterns = ["--wrong-pattern", "--pattern", "batched", "--pattern", "wrong-offset"]
    arguments = ["compare", "-m", str(folder), "-n", "6", "-q", *patterns]
    code, output = run_on_terminal(*arguments, environment={"COLUMNS": columns})
    assert code == 0
    rows = [line for line in re.sub(r"\x1b\[[\d;]*m", "", output).splitlines() if re.match(r" [a-z-]+ +[a-z]", line)]
    verdicts = {line.split()[0]: line.split()[1] for line in rows}
    assert verdicts["full-sequence"] == verdicts["uncached"] == verdicts["batched"] == "equivalent"
    assert verdicts["last-token"] == verdicts["wrong-offset"] == "different"
    assert "\u2026" not in output
    assert all(len(line) <= int(columns) for line in rows)


def test_a_pipe_gets_the_verdicts_in_one_line(tiny_llama) -> None:
    folder, _ = tiny_llama()
    names = ["batched", "stale-chunk", "wrong-offset", "left-pad-ignored"]
    patterns = ["--wrong-pattern", *(word for name in names for word in ("--pattern", name))]
    first, *more = run("compare", "-m", str(folder), "-n", "6", *patterns).stdout.splitlines()
    assert [part.split(":")[0] for part in first.split("   ")] == ["full-sequence", "last-token", *names]
    assert more[-1].startswith("Not tested: texts beyond 258 positions")


def test_a_use_that_was_not_checked_is_shown(model_file: str) -> None:
    text = " ".join(compare("-m", f"{model_file}:right").stdout.split())
    assert "equal up to rounding in more steps" in text
    assert "past a window not checked: the model does not declare windows" in text
    assert "Not tested: texts beyond 258 positions" in text


def test_html_is_one_page_with_plots_and_nothing_from_elsewhere(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    page = tmp_path / "report.html"
    result = run("compare", "-m", str(folder), "--wrong-pattern", "-n", "6", "-p", "<b>&x", "--html", str(page))
    assert result.returncode == 0, result.stderr
    html = page.read_text()
    assert "<svg" in html
    assert "&lt;b&gt;&amp;x" in html
    assert "<b>&x" not in html
    assert "<script" not in html
    assert html.index("<h1>full-sequence: <span") < html.index("<table")
    assert 'name="viewport"' in html
    assert "noise floor" in html.lower()
    assert result.stderr == ""
    assert 'src="' not in html
    for row in ("full-sequence", "last-token", "equivalent", "different"):
        assert row in html


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--pattern", "no-such"], 2, "'no-such'"),
        (["-p", "x", "--text", "y"], 2, "one of --prompt"),
        (["-f", "/dev/null"], 2, "--prompt-file /dev/null: the file has no prompts"),
        (["-m", "{model}:right"], 2, "no tokenizer"),
        (["-m", "{model}:right", "--ids"], 2, "--ids needs --prompt"),
        (["-m", "{model}:right", "--ids", "-p", "hello"], 2, "'hello' is not a token id"),
        (["-m", "{model}:absent", "--ids", "-p", "1 2"], 2, "no function 'absent'"),
        (["-m", "{model}:nothing", "--ids", "-p", "1 2"], 2, "returned int"),
        (["-m", "{model}:broken", "--ids", "-p", "1 2"], 1, "RuntimeError: no weights here"),
        (["-m", "/no/such.py:make", "--ids", "-p", "1 2"], 2, "no file /no/such.py"),
        (["--html", "/no/such/folder/x.html", "-m", "{model}:right", "--ids", "-p", "1 2", "-n", "2"], 1, "--html"),
    ],
    ids=str,
)
def test_errors_are_one_line(model_file: str, arguments: list[str], code: int, message: str) -> None:
    result = run("compare", *(argument.format(model=model_file) for argument in arguments))
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_on_a_terminal_model_text_cannot_steer_it(tiny_llama) -> None:
    folder, _ = tiny_llama()
    code, output = run_on_terminal("compare", "-m", str(folder), "-p", "\x1b]0;x\x07abc", "-n", "6", "--quiet")
    assert code == 0
    assert "\x1b]0;" not in output
    assert "\x07" not in output


@pytest.mark.parametrize("command", ["compare", "bench"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_computed(command: str, tmp_path: Path) -> None:
    result = run(command, "-m", "/no/such/model", "--html", str(tmp_path / "none" / "x.html"))
    assert (result.returncode, result.stdout) == (1, "")
    assert "there is no folder" in result.stderr


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_of_a_page_and_the_old_one(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    page = tmp_path / "report.html"
    page.write_text("the old one")
    command = " ".join([*KVGEN, "compare", "-m", str(folder), "-n", "2", "--html", str(page)])
    limited = subprocess.run(["bash", "-c", f"ulimit -f 8; trap '' XFSZ; {command}"], capture_output=True, text=True)
    assert limited.returncode == 1
    assert limited.stderr == f"kvgen: error: --html {page}: cannot be written (File too large)\n"
    assert page.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "tiny"]


def test_a_page_has_no_control_characters_and_goes_to_a_pipe_or_through_a_link(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    link, target = tmp_path / "link.html", tmp_path / "target.html"
    link.symlink_to(target)
    arguments = ["compare", "-m", str(folder), "-n", "2", "-p", "a\x1b[31m\u202eb"]
    assert run(*arguments, "--html", str(link)).returncode == 0
    assert link.is_symlink()
    assert "a\\x1b[31m\\u202eb" in target.read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", target.read_text())
    piped = run(*arguments, "--html", "/dev/stdout")
    assert piped.stdout.startswith(target.read_text()[:500])


def test_a_narrow_terminal_folds_tables_and_keeps_completions_whole(tiny_llama) -> None:
    folder, _ = tiny_llama()
    arguments = ["compare", "-m", str(folder), "-n", "6", "-q", "-p"]
    shown = [run_on_terminal(*arguments, "abc", environment={"COLUMNS": columns})[1] for columns in ("20", "200")]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", output) for output in shown]
    assert "\u2026" not in plain[0]
    rows = re.compile(r"^(?:uncached|full-sequence)  +(?!equi)(.*)\r$", re.MULTILINE)
    completions = [rows.findall(output) for output in plain]
    assert completions[0] == completions[1]
    assert len(completions[0]) == 2


def test_help_shows_examples_and_exit_codes() -> None:
    text = run("compare", "--help").stdout
    for part in ("--wrong-pattern", "kvgen compare --wrong-pattern", "Exit codes: 0"):
        assert part in text


def test_convert_says_what_the_library_lacks(tmp_path: Path) -> None:
    for family, obstacle in (("mistral", "its layers have sliding windows"), ("gemma", "activation is 'gelu_tanh'")):
        make_checkpoint(family, 0, tmp_path / family)
        Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / family / "tokenizer.json"))
        result = run("convert", str(tmp_path / family), "--to", "x-transformers", str(tmp_path / "converted"))
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"kvgen: error: cannot be converted to x-transformers: {obstacle}"), (
            result.stderr
        )
        assert "(" not in result.stderr


def test_convert_writes_a_folder_that_the_library_runs(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama(rms_norm_eps=1e-12)
    target = tmp_path / "converted"
    result = run("convert", str(folder), "--to", "x-transformers", str(target))
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    arguments = ["-p", "Hello", "-t", "0", "-n", "8"]
    original = run("generate", "-m", str(folder), *arguments)
    converted = run("generate", "-m", str(target), *arguments)
    assert (converted.stdout, converted.stderr) == (original.stdout, "")
    again = run("convert", str(folder), "--to", "x-transformers", str(target))
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_verify_cache_passes_a_right_cache_and_stops_at_a_wrong_one(model_file: str) -> None:
    arguments = ["--ids", "-p", "5 17 3 8", "-t", "0", "-n", "6"]
    right = run("generate", "-m", f"{model_file}:right", *arguments, "--verify-cache")
    assert (right.returncode, right.stderr) == (0, "")
    wrong = run("generate", "-m", f"{model_file}:wrong", *arguments, "--verify-cache=2")
    assert wrong.returncode == 1
    assert "after 5 positions" in wrong.stderr
    unasked = run("generate", "-m", f"{model_file}:wrong", *arguments)
    assert (unasked.returncode, unasked.stdout) == (0, right.stdout)
    assert "continuing without it" in unasked.stderr


@pytest.mark.parametrize("model", ["right", "wrong"])
def test_junit_has_a_test_for_each_use_and_the_reason_of_each_failure(
    model_file: str, tmp_path: Path, model: str
) -> None:
    path = tmp_path / "report.xml"
    result = compare("-m", f"{model_file}:{model}", "--pattern", "last-token", "--junit", str(path), "--json")
    pattern = json.loads(result.stdout)["comparisons"][0]["patterns"][1]
    (suite,) = ElementTree.parse(path).getroot()
    cases = {case.get("name"): [(part.tag, part.get("message")) for part in case] for case in suite}
    assert list(cases) == ["full-sequence", *(f"full-sequence: {probe['name']}" for probe in pattern["probes"])]
    failed = {name for name, parts in cases.items() if "failure" in dict(parts)}
    skipped = {name for name, parts in cases.items() if "skipped" in dict(parts)}
    assert (suite.get("failures"), suite.get("skipped")) == (str(len(failed)), str(len(skipped)))
    assert skipped == {f"full-sequence: {probe['name']}" for probe in pattern["probes"] if probe["note"]}
    assert failed - {"full-sequence"} == {f"full-sequence: {p['name']}" for p in pattern["probes"] if p["wrong"]}
    assert all(len(p["ids"]) == p["length"] for p in pattern["probes"] if p["wrong"])
    if model == "wrong":
        assert pattern["findings"][0]["text"] in dict(cases["full-sequence"])["failure"]
    assert ("full-sequence" in failed) == (model == "wrong") == bool(result.returncode)


def test_a_junit_file_that_cannot_be_written_is_refused_first(model_file: str) -> None:
    result = compare("-m", f"{model_file}:right", "--junit", "/nowhere/report.xml")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "kvgen: error: --junit /nowhere/report.xml: there is no folder /nowhere\n"


def test_control_characters_of_a_prompt_do_not_break_junit() -> None:
    comparison = {"prompt": "a\x00\x1b\ud800<", "text_ids": [], "patterns": [], "cross_check": None}
    text = as_junit({"backend": "native", "model": "m", "comparisons": [comparison]})
    (suite,) = ElementTree.fromstring(text)
    assert suite.get("name") == "native: a\ufffd\ufffd\ufffd<"
