"""`kvgen bench`: what it says, not how fast it is."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

import kvgen
from kvgen import UsageError
from kvgen.bench.measure import measure
from kvgen.kernels.processors import chosen_variant
from kvgen.model.cache import KVCache
from tests import program
from tests.families import make_checkpoint

run = partial(program.run, "bench")


def test_lengths_that_fit_are_measured(tiny_llama) -> None:
    folder, reference = tiny_llama()
    model = kvgen.load(folder).model
    seen = []
    result = measure(model, repeat=1, progress=lambda done, total: seen.append((done, total)))
    assert [row.tokens for row in result.prefill] == [128, 512]
    assert [row.context for row in result.decode] == [16]
    assert [row.length for row in result.growth] == [16, 64, 256]
    assert seen == [(done, 7) for done in range(1, 8)]
    assert result.weight_bytes >= sum(parameter.nbytes for parameter in reference.parameters())
    assert result.peak_bytes > result.weight_bytes
    with pytest.raises(UsageError, match="1040 tokens do not fit the model's context of 512"):
        measure(model, contexts=[1024])


@pytest.mark.parametrize("kernels", ["cpp", "off"])
def test_bytes_of_a_step(tiny_llama, kernels: str) -> None:
    """The table of embeddings is looked up, not read; a tied one is read as the head."""
    for tied in (False, True):
        folder, reference = tiny_llama(name=f"tied-{tied}", tie_word_embeddings=tied)
        model = kvgen.load(folder, kernels=kernels).model
        weights = sum(parameter.nbytes for parameter in reference.parameters())
        assert weights <= model.weight_bytes <= 1.4 * weights  # panels of 32 rows
        assert model.weight_bytes - model.step_bytes == (0 if tied else 384 * 32 * 4)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_bytes_that_the_cache_holds(kind: str, tmp_path: Path) -> None:
    make_checkpoint(kind, 0, tmp_path)
    model = kvgen.load(tmp_path, tokenizer="ids").model
    cache: KVCache | None = None
    for length in (1, 2, 50, 60):
        _, cache = model(torch.zeros(1, length, dtype=torch.int64), cache)
        entries = [min(layer.buffers.keys.shape[2], length) for layer in cache.states]
        row = 2 * 4 * model.decoder.config.attention.kv_heads * model.decoder.config.attention.head_dim
        held = sum(entries) * row
        assert cache.nbytes_held <= cache.nbytes
        assert cache.nbytes_held == held if kind == "llama" else cache.nbytes_held <= held


def test_on_a_pipe_json_and_page(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    page = tmp_path / "page.html"
    result = run("-m", str(folder), "--contexts", "16,32", "--repeat", "1", "--json", "--html", str(page))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    data = json.loads(result.stdout)
    assert [row["context"] for row in data["decode"]] == [16, 32]
    assert data["decode"][0]["rate"] == pytest.approx(1 / data["decode"][0]["seconds"], rel=0.01)
    assert data["engine"] == chosen_variant().engine
    assert "<svg" in page.read_text()
    table = run("-m", str(folder), "--repeat", "1", "--kernels", "off").stdout
    assert re.search(r"torch, float32 on cpu, \d+ threads", table)
    assert "\x1b" not in table


def test_a_page_without_a_plot_has_the_tables(tiny_llama, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    sizes = ["--prompts", "8", "--contexts", ",", "--lengths", ","]
    result = run("-m", str(tiny_llama()[0]), *sizes, "--repeat", "1", "--html", str(page))
    assert (result.returncode, result.stderr) == (0, "")
    assert "<td>8</td>" in page.read_text()
    assert "<svg" not in page.read_text()
    assert 'name="viewport"' in page.read_text()


@pytest.mark.parametrize("value", ["x", "0", "-3", "1.5"])
def test_lengths_that_are_none_are_refused(value: str) -> None:
    result = run("--contexts", value)
    assert result.returncode == 2
    assert result.stderr.startswith("kvgen: --contexts") or "--contexts" in result.stderr
