"""Every `$ command` in the documents, with the output that is printed below it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kvgen.checkpoint import read_checkpoint
from kvgen.families import base, experts
from kvgen.families.family import GGUF_NAMES
from tests.families import make_checkpoint
from tests.gguf_files import write_gguf
from tests.program import run, run_python
from tests.sizes import first

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
def test_documents_show_what_is_printed(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, document: str, command: str, output: str
) -> None:
    monkeypatch.chdir(ROOT)
    if command.startswith("kvgen ") and "|" not in command:
        result = run(*shlex.split(command)[1:])
    else:
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    assert result.stdout == output


@pytest.mark.parametrize("page", first(1, ["README.md", "docs/python.md"]))
def test_python_examples_print_what_is_shown(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    """The ```python blocks of a page are one program; a ```text block after one is what it prints."""
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", (ROOT / page).read_text(), re.DOTALL)
    code, shown = ("".join(parts) for parts in zip(*blocks, strict=True))
    monkeypatch.chdir(tmp_path)
    result = run_python(code)
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


def test_the_texts_of_the_benchmarks_are_those_that_figures_were_measured_on() -> None:
    texts = sorted((ROOT / "benchmarks" / "texts").iterdir())
    digest = sha256(b"".join(text.read_bytes() for text in texts)).hexdigest()
    assert digest == "6fe84c64dadfc3f7182c647d92b6e3fccf61d5a61afe4745b6696e3b2ed11a13"


WALK_THROUGH = (ROOT / "docs" / "adding-a-family.md").read_text()


def test_the_walk_through_a_family_shows_its_code() -> None:
    """Each block is in the file that is named last before it."""
    *parts, _ = re.split(r"```(?:py|md)\n(.*?)```", WALK_THROUGH, flags=re.DOTALL)
    assert len(parts) == 10
    for number, code in enumerate(parts[1::2]):
        named = re.findall(r"`((?:kvgen|tests|docs)/[\w/-]+\.\w+)`", "".join(parts[: 2 * number + 1 : 2]))
        assert code.strip() in (ROOT / named[-1]).read_text(), named[-1]


def test_the_walk_through_a_family_shows_its_fields_names_and_description(tmp_path: Path) -> None:
    model = make_checkpoint("qwen3_moe", 0, tmp_path)
    write_gguf(tmp_path / "tiny.gguf", "qwen3_moe", model)
    rows = re.findall(r"^\| `(\w+)`[^|]* \| `?([\w.]*)`? ?\| .*`[A-Z]\w+\.\w+`", WALK_THROUGH, re.MULTILINE)
    fields, keys = ({name for name in column if name} for column in zip(*rows, strict=True))
    assert len(rows) == 14
    assert fields <= read_checkpoint(tmp_path).metadata.keys()
    assert {f"qwen3moe.{key}" for key in keys} <= read_checkpoint(tmp_path / "tiny.gguf").metadata.keys()
    homes = re.findall(r"^\| `([\w.{}]+)` \| `(\w+)` \| `([\w.]+)` \| `(HF_\w+)` \|", WALK_THROUGH, re.MULTILINE)
    assert len(homes) == 4
    for name, gguf_name, home, table in homes:
        assert {**vars(base), **vars(experts)}[table][f"model.layers.{{i}}.{name}"] == f"blk.{{i}}.{home}"
        assert GGUF_NAMES[f"blk.{{i}}.{gguf_name}"] == f"blk.{{i}}.{home}"
    [description] = re.findall(r"```text\n(.*?)```", WALK_THROUGH, re.DOTALL)
    assert set(description.splitlines()) <= set(run("inspect", str(tmp_path)).stdout.splitlines())
