"""llama.cpp as an engine of `kvgen compare`, in the real library. Tests that need it are slow and skip without it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import kvgen
from kvgen import EngineOptions, Loaded, UnsupportedError, UsageError, load_engine
from kvgen.comparison.comparison import Comparison, compare_ids
from kvgen.comparison.crosscheck import Agreement, cross_check
from kvgen.comparison.rounding import distance
from kvgen.comparison.subjects import subject_of
from kvgen.comparison.verdict import Verdict
from tests.families import make_model
from tests.gguf_files import CONFIGS, write_gguf
from tests.test_compare import PROMPT, names

try:
    importlib.import_module("llama_cpp")
    _INSTALLED = True
except (ImportError, RuntimeError, OSError):  # its library may be missing, or be built for another processor
    _INSTALLED = False
needs_llama_cpp = pytest.mark.skipif(not _INSTALLED, reason="needs llama-cpp-python")
FAMILIES = (
    *("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "olmo2", "cohere2", "starcoder2", "stablelm"),
    *("gpt_oss", "mixtral", "lfm2", "mamba2", "granitemoehybrid", "falcon_h1"),
)
OTHERWISE = ("phi3", "gpt_oss")  # computed without its window; with YaRN whose ends are cut, which GGUF cannot say
WINDOWED = ("gemma2", "gemma3_text", "cohere2", "gpt_oss")
GEMMA = Path(os.environ.get("KVGEN_TEST_GEMMA", "no such file"))  # Gemma 3 270M in GGUF


def write(folder: Path, kind: str, **options: Any) -> Path:
    path = folder / f"{kind}.gguf"
    write_gguf(path, kind, make_model(kind, {**next(known for name, known in CONFIGS if name == kind), **options}))
    return path


def opened(path: Path, **options: Any) -> Loaded:
    return load_engine("llama.cpp", path, EngineOptions(**{"tokenizer": "ids", **options}))


def run(loaded: Loaded, *patterns: str, **options: Any) -> Comparison:
    return compare_ids(loaded.model, PROMPT, patterns=("full-sequence", *patterns), steps=24, **options)


def test_without_the_library_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "kvgen.comparison.engines.llama_cpp", raising=False)
    monkeypatch.delitem(sys.modules, "kvgen.comparison.engines.llama_context", raising=False)
    with pytest.raises(UnsupportedError, match=r"needs llama_cpp: pip install 'kvgen\[llama-cpp\]'"):
        opened(tmp_path / "model.gguf")


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("kind", FAMILIES)
def test_correct_caches_raise_no_alarm(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    for cache in ("auto", "unified", *(["windowed"] if kind in WINDOWED else [])):
        loaded = opened(path, cache=cache)
        comparison = run(loaded, "batched", "last-token", thorough=True)
        assert [row.verdict for row in comparison.rows] == [Verdict.EQUIVALENT] * 4, cache
        assert names(comparison.rows[3]) == {"harmless here"}
        probes = {probe.name: probe for probe in comparison.rows[1].probes}
        assert probes["saved and loaded"].ratio is not None
        if kind not in OTHERWISE:
            found = cross_check(loaded, kvgen.load(path, tokenizer="ids"), comparison.ids, comparison.start)
            assert found.agreement is Agreement.EQUAL


@pytest.mark.slow
@needs_llama_cpp
def test_a_window_that_llama_cpp_leaves_out_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, "phi3")
    found = cross_check(opened(path), kvgen.load(path, tokenizer="ids"), PROMPT * 2, len(PROMPT))
    assert (found.agreement, found.length, found.findings[0].name) == (Agreement.DIFFERENT, 10, "window")
    assert "up to 9 tokens" in found.findings[0].text


@pytest.mark.slow
@needs_llama_cpp
def test_what_a_recurrent_layer_cannot_go_back_to_is_computed_again(tmp_path: Path) -> None:
    subject = subject_of(opened(write(tmp_path, "lfm2")).model)
    ids = subject.backend.ids_tensor(PROMPT)
    _, cache = subject(ids, None)
    _, cache = subject(ids[:, :8], cache)
    assert (cache.reused, cache.computed) == (0, 8)
    _, cache = subject(ids, cache)
    assert (cache.reused, cache.computed) == (8, 4)


@pytest.mark.slow
@needs_llama_cpp
def test_snapshots_of_recurrent_layers_are_wrong_after_single_steps(tmp_path: Path) -> None:
    """llama.cpp of llama-cpp-python 0.3.36: it keeps the states of the last call, and goes back beyond them."""
    row = run(opened(write(tmp_path, "lfm2"), cache="snapshots")).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert names(row) == {"edits not noticed"}


@pytest.mark.slow
@needs_llama_cpp
def test_what_left_a_window_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(opened(write(tmp_path, "gemma3_text", max_position_embeddings=1024), cache="windowed").model)
    ids = subject.backend.ids_tensor(PROMPT * 50)

    def edited_far_back() -> tuple[int, float]:
        cache = None
        for length in range(60, ids.shape[1] + 1, 60):
            _, cache = subject(ids[:, :length], cache)
        other = torch.cat((ids[:, :100], ids[:, 5:6]), dim=1)
        logits, cache = subject(other, cache)
        return cache.reused, distance(logits[0, -1], subject.uncached(other)[0, -1])

    reused, apart = edited_far_back()
    assert reused == 0
    assert apart < 0.01
    monkeypatch.setattr("kvgen.comparison.engines.llama_context.lib.llama_memory_seq_pos_min", lambda *_: 0)
    reused, apart = edited_far_back()
    assert reused == 100
    assert apart > 0.1


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize(
    ("changed", "cause"),
    [({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}, "positions"), ({"seed": 1}, "other weights")],
    ids=["rope-base", "other-weights"],
)
def test_another_checkpoint_is_found_with_its_cause(changed: dict[str, Any], cause: str, tmp_path: Path) -> None:
    plain = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    for name, options in (("a", {}), ("b", changed)):
        seed = options.get("seed", 0)
        settings = plain | {key: value for key, value in options.items() if key != "seed"}
        write_gguf(tmp_path / f"{name}.gguf", "llama", make_model("llama", settings, seed=seed))
    reference = kvgen.load(tmp_path / "b.gguf", tokenizer="ids")
    found = cross_check(opened(tmp_path / "a.gguf"), reference, PROMPT * 2, len(PROMPT))
    assert (found.agreement, [finding.name for finding in found.findings]) == (Agreement.DIFFERENT, [cause])


@pytest.mark.slow
@needs_llama_cpp
def test_what_the_library_refuses_is_said_in_its_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "llama")
    with pytest.raises(UnsupportedError, match="quantized V cache requires flash_attn"):
        opened(path, kv_dtype="int8", attention="eager")
    with pytest.raises(UnsupportedError, match="no cache 'windowed' for this model"):
        opened(path, cache="windowed")
    with pytest.raises(UsageError, match="cache 'ring' is not one that llama.cpp has: auto, windowed"):
        opened(path, cache="ring")
    with pytest.raises(UsageError, match="dtype 'bfloat16' is not one that llama.cpp has: auto"):
        opened(path, dtype="bfloat16")
    loaded = opened(path)
    kept = [loaded.model(loaded.model.ids_tensor(PROMPT), None) for _ in range(12)]
    with pytest.raises(UnsupportedError, match="no more than 12 sequences"):
        loaded.model(loaded.model.ids_tensor(PROMPT), None)
    del kept
    loaded.model(loaded.model.ids_tensor(PROMPT), None)
    assert capfd.readouterr().err.count("llama") == 0


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"attention": "eager", "cache": "unified"}], ids=str)
def test_quantized_models_raise_no_alarm(options: dict[str, str], smollm2_path: Path) -> None:
    for path in (smollm2_path, *([GEMMA] if GEMMA.exists() else [])):
        loaded = load_engine("llama.cpp", path, EngineOptions(**options))
        comparison = kvgen.compare(loaded, "The river is long,", patterns=("full-sequence", "batched"), steps=24)
        assert comparison.acceptable, path
        found = cross_check(loaded, kvgen.load(path), comparison.ids, comparison.start, "The river is long,")
        assert found.agreement is not Agreement.DIFFERENT
