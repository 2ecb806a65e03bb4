"""Defaults: a file, profiles in it, and the environment, each counting more than the one before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.main import get_command

from kvgen.cli import app
from kvgen.cli.compare import complete_pattern
from kvgen.comparison.patterns import PATTERNS
from tests.program import run

CONFIG = """
temperature = 0.3
max-tokens = 7

[batch]
max-tokens = 5

[profile.warm]
temperature = 1.5

[profile.warm.generate]
stop = ["\\n", "."]
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG)
    return {**os.environ, "KVGEN_CONFIG": str(file)}


def shown(*arguments: str, env: dict[str, str]) -> dict[tuple[str, str], object]:
    value = json.loads(run(*arguments, "config", "--json", env=env).stdout)
    return {(setting["command"], setting["name"]): setting["value"] for setting in value["settings"]}


def test_the_file_and_the_environment_are_shown(environment: dict[str, str]) -> None:
    assert shown(env=environment) == {("", "temperature"): 0.3, ("", "max_tokens"): 7, ("batch", "max_tokens"): 5}
    warm = shown("--profile", "warm", env={**environment, "KVGEN_MAX_TOKENS": "9"})
    assert warm == {
        ("", "temperature"): 1.5,
        ("", "max_tokens"): "9",
        ("batch", "max_tokens"): 5,
        ("generate", "stop"): ["\n", "."],
    }
    text = run("config", env=environment)
    assert f"batch max-tokens = 5  ({environment['KVGEN_CONFIG']}, [batch])" in text.stdout
    assert text.stderr == ""


@pytest.mark.parametrize("value", ["2020-01-01", "nan", "[1, 12:00:00]", "{a = 1}"])
def test_a_value_that_no_option_has_is_refused(environment: dict[str, str], value: str) -> None:
    Path(environment["KVGEN_CONFIG"]).write_text(f"[batch]\ntemperature = {value}\n")
    result = run("config", "--json", env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert "config.toml, [batch]: 'temperature' is no text, finite number" in result.stderr


def test_an_empty_name_of_the_file_counts_as_none_and_a_device_is_refused(environment: dict[str, str]) -> None:
    folder = {"XDG_CONFIG_HOME": str(Path(environment["KVGEN_CONFIG"]).parent)}
    assert run("config", env={**environment, **folder, "KVGEN_CONFIG": ""}).returncode == 0
    refused = run("config", env={**environment, "KVGEN_CONFIG": "/dev/zero"})
    assert (refused.returncode, refused.stderr) == (1, "kvgen: error: /dev/zero: not a file\n")


def test_defaults_are_used_and_options_count_more(environment: dict[str, str], tiny_llama) -> None:
    folder, _ = tiny_llama()

    def generated(*arguments: str, **more: str) -> int:
        command = ["generate", "-m", str(folder), "-p", "the red 0", "--json", "-t", "0"]
        return len(json.loads(run(*command, *arguments, env={**environment, **more}).stdout)["completion_ids"])

    assert generated() == 7
    assert generated(KVGEN_MAX_TOKENS="4") == 4
    assert generated("-n", "3", KVGEN_MAX_TOKENS="4") == 3
    row = run("batch", "-m", str(folder), "-t", "0", input='"the red 0"\n', env=environment)
    assert json.loads(row.stdout)["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        ("temprature = 1", [], 2, "'temprature' is not an option of any command"),
        ("[generat]\nseed = 1", [], 2, "[generat] is not a command"),
        ("seed = ", [], 2, "not valid TOML"),
        ("", ["--profile", "x"], 1, "no profile 'x'"),
        ("max-tokens = 'many'", ["generate", "-p", "x"], 2, "'--max-tokens' / '-n': Input should be a valid integer"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, content: str, arguments: list[str], code: int, message: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(content)
    command = arguments if "generate" in arguments else [*arguments, "config"]
    found = run(*command, env={**os.environ, "KVGEN_CONFIG": str(file)})
    assert (found.returncode, found.stdout) == (code, "")
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_without_anything_chosen_it_says_where_to_choose(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVGEN_")}
    found = run("config", env={**environment, "XDG_CONFIG_HOME": str(tmp_path)})
    assert (found.returncode, found.stdout) == (0, "")
    assert str(tmp_path / "kvgen" / "config.toml") in found.stderr


def test_a_wrong_value_names_where_it_stands(environment: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("max-tokens = 'many'\n[batch]\nmax-tokens = 'more'\n")

    def said(*arguments: str, **more: str) -> str:
        return run(*arguments, env={**environment, **more}).stderr

    assert f", in {file} (see" in said("generate", "-p", "x")
    assert f", in {file}, [batch] (see" in said("batch")
    assert ", in KVGEN_MAX_TOKENS (see" in said("generate", "-p", "x", KVGEN_MAX_TOKENS="all")
    assert ", in" not in said("generate", "-p", "x", "-n", "all")


def test_help_names_the_tables_of_the_file() -> None:
    shown = " ".join(run("config", "--help").stdout.split())
    assert "Options of one command go under [generate], those of `kvgen --profile NAME` under [profile.NAME]." in shown


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("kvgen generate --model smol", ["smollm2"]),
        ("kvgen --profile w", ["warm"]),
        ("kvgen compare --pattern la", ["last-token"]),
    ],
    ids=str,
)
def test_the_shell_completes_names(environment: dict[str, str], words: str, names: list[str]) -> None:
    asked = {"_KVGEN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert run(env={**environment, **asked}).stdout.split() == names


def test_the_patterns_that_the_shell_completes_are_those_that_there_are() -> None:
    assert {*complete_pattern(""), "uncached", "full-sequence"} == set(PATTERNS)


def test_every_option_of_a_command_can_be_set_by_its_long_name() -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            long = [option for option in parameter.opts if option.startswith("--")]
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"--{parameter.name.replace('_', '-')}" in long, f"kvgen {name}"
