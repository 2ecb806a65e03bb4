"""Every `$ command` in the documents, with the output that is printed below it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def transcripts() -> list[Any]:
    """(document, command, output) of each command in a ```console block."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```console\n(.*?)```", document.read_text(), re.DOTALL):
            for command, output in re.findall(r"^\$ (.*?)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
                found.append((document.name, command, output))
    # What two documents show alike is run once.
    once = {(command, output): (document, command, output) for document, command, output in found}
    return [pytest.param(*one, marks=() if one[0] == "README.md" else pytest.mark.slow) for one in once.values()]


@pytest.mark.parametrize(("document", "command", "output"), transcripts())
def test_documents_show_what_is_printed(smollm2_path: Path, document: str, command: str, output: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == output


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_examples_print_what_is_shown(smollm2_path: Path, tmp_path: Path, page: str) -> None:
    """The ```python blocks of a page are one program; a ```text block after one is what it prints."""
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", (ROOT / page).read_text(), re.DOTALL)
    code, shown = ("".join(parts) for parts in zip(*blocks, strict=True))
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == shown


def test_files_that_the_commands_of_the_readme_read_are_in_the_repository() -> None:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    named = re.findall(r"(?<= )(?:prompts/|docs/)[\w./]+|LICENSE", blocks)
    assert len(named) >= 4
    for name in named:
        assert (ROOT / name).is_file(), name


def test_links_between_documents_lead_somewhere() -> None:
    for page in (*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_walk_through_a_family_shows_its_code() -> None:
    page = (ROOT / "docs" / "adding-a-family.md").read_text()
    code, row = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert code in (ROOT / "kvgen" / "families" / "olmo2.py").read_text()
    assert row.strip() in (ROOT / "tests" / "families.py").read_text()
