"""The house: imports point one way, the decoder knows no family, and the library keeps off the terminal."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import kvgen
from kvgen.families import FAMILIES
from tests.program import run_python

ROOT = Path(kvgen.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Each package or module may import from those before it in this list, and from itself.
IMPORT_ORDER = [
    "kvgen.errors",
    "kvgen.system",
    "kvgen.pages",
    "kvgen.model.mixers",
    "kvgen.model.ffns",
    "kvgen.model.config",
    "kvgen.model.states",
    "kvgen.model.recurrent",
    "kvgen.model.cache",
    "kvgen.model.ids",
    "kvgen.model.spans",
    "kvgen.model.causal_lm",
    "kvgen.model.layers",
    "kvgen.model.moe",
    "kvgen.model.sparse_mlp",
    "kvgen.model.mlp_and_experts",
    "kvgen.model.laurel",
    "kvgen.model.layer_inputs",
    "kvgen.model.altup",
    "kvgen.model.attention",
    "kvgen.model.shared_attention",
    "kvgen.model.latent_attention",
    "kvgen.model.short_conv",
    "kvgen.model.mamba2",
    "kvgen.model.mamba",
    "kvgen.model.delta_net",
    "kvgen.model.block",
    "kvgen.model.decoder",
    "kvgen.contract",
    "kvgen.checkpoint",
    "kvgen.families",
    "kvgen.kernels",
    "kvgen.cuda",
    "kvgen.backends",
    "kvgen.tokenizer",
    "kvgen.hub",
    "kvgen.loading",
    "kvgen.generation.counts",
    "kvgen.generation.settings",
    "kvgen.generation.step",
    "kvgen.generation.scores",
    "kvgen.generation.sampling",
    "kvgen.generation.drafts",
    "kvgen.generation.completion",
    "kvgen.generation.kept",
    "kvgen.generation.loop",
    "kvgen.generation.prefetch",
    "kvgen.generation.constraint",
    "kvgen.generation.text",
    "kvgen.generation.events",
    "kvgen.generation.row",
    "kvgen.generation.batch",
    "kvgen.generation.stream",
    "kvgen.generation.prompt_cache",
    "kvgen.generation.conversation",
    "kvgen.generation.scoring",
    "kvgen.pipeline",
    "kvgen.client",
    "kvgen.server",
    "kvgen.bench",
    "kvgen.comparison",
    "kvgen.testing",
    "kvgen",
    "kvgen.cli",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    return max((name for name in IMPORT_ORDER if module == name or module.startswith(f"{name}.")), key=len)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if (ROOT.parent / node.module.replace(".", "/")).is_dir() else node.module
                for alias in node.names
            }
    return {name for name in found if name.split(".")[0] == "kvgen"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = module_name(path)
    if module in ("kvgen", "kvgen.__main__"):  # the front door names everything
        return
    order = IMPORT_ORDER.index(package_of(module))
    for imported in imports_of(path):
        assert IMPORT_ORDER.index(package_of(imported)) <= order, f"{module} imports {imported}"


def test_no_family_is_named_outside_families() -> None:
    names = {name for family in FAMILIES for name in (family.hf_model_type, family.gguf_architecture)} - {""}
    any_name = re.compile(rf"(?<![a-z])({'|'.join(sorted(names))})", re.IGNORECASE)
    # Names of programs and their functions, of vocabularies in the GGUF format, and of mechanisms contain those of
    # families.
    allowed = re.compile(r"llama[._-]?cpp|\bllama_\w+|['\"`]gpt2['\"`]|['\"`]llama['\"`]|mamba ?2", re.IGNORECASE)
    for path in FILES:
        if ROOT / "families" in path.parents or path == ROOT / "tokenizer" / "pretokenizers.py":
            continue
        text = allowed.sub("", path.read_text())
        assert not (named := any_name.search(text)), f"{path} names {named[0]}"


def test_the_library_keeps_off_the_terminal() -> None:
    for path in FILES:
        if ROOT / "cli" in path.parents:
            continue
        text = path.read_text()
        assert "import rich" not in text and "from rich" not in text, path
        assert "sys.stdout" not in text and "sys.stderr" not in text, path


def test_the_package_shows_what_it_has() -> None:
    code = "import pydoc, kvgen; shown = pydoc.plain(pydoc.render_doc(kvgen)); print(shown, *dir(kvgen))"
    shown = run_python(code).stdout
    assert set(kvgen.__all__) <= set(dir(kvgen))
    for name in ("compare", "generate", "load", "score", "stream"):
        assert f"\n    {name}(" in shown
