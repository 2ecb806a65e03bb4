"""The Python API: runnable examples in its docstrings, typed options, and a cheap import."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvgen

PUBLIC = [name for name in kvgen.__all__ if not name.endswith("Error")]


def run_examples(name: str, loaded: kvgen.Loaded) -> str:
    """Run the examples in a docstring; return what failed."""
    failures: list[str] = []
    namespace = {"kvgen": kvgen, "loaded": loaded, "torch": torch}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(kvgen, name), name, globs=namespace)
    assert test.examples, f"kvgen.{name} has no example"
    doctest.DocTestRunner().run(test, out=failures.append)
    return "".join(failures)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "Comparison" else ()) for name in PUBLIC]
)
def test_docstring_examples_print_what_they_show(
    name: str, smollm2: kvgen.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "load_prompt_cache":  # reads the file that this example writes
        run_examples("save_prompt_cache", smollm2)
    assert run_examples(name, smollm2) == ""


def test_every_public_name_is_there_and_the_import_is_cheap() -> None:
    code = """
import sys, kvgen
assert "torch" not in sys.modules
assert set(kvgen.__all__) <= set(dir(kvgen))
from kvgen import *
assert kvgen.Batch is Batch
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_options_are_typed(tmp_path: Path) -> None:
    right = [
        'text: str = kvgen.generate(loaded, "a", max_tokens=3, stop=".", use_cache=False)',
        "chunks = [chunk.text for chunk in kvgen.stream(loaded, [1, 2], drafter=kvgen.PromptLookup())]",
        'answer = kvgen.chat(loaded, [{"role": "user", "content": "a"}], kvgen.Sampling(seed=1), top_logprobs=2)',
    ]
    wrong = [
        'kvgen.generate(loaded, "a", max_token=3)',
        'kvgen.generate(loaded, "a", max_tokens="3")',
        'kvgen.stream(loaded, "a", constraint="[0-9]+")',
        'kvgen.chat(loaded, "a")',
        "kvgen.nothing",
    ]
    script = tmp_path / "script.py"
    script.write_text("\n".join(["import kvgen", "", 'loaded = kvgen.load("smollm2")', *right, *wrong]) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(script)]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    lines = {int(line.split(":")[1]) for line in found.splitlines() if line.startswith(f"{script}:")}
    first = 4 + len(right)
    assert lines == set(range(first, first + len(wrong))), found
