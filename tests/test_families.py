"""Every family against transformers, in fp32: logits, and the cache past the window."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from kvgen import CheckpointError, KvgenError, UnsupportedError
from kvgen.backends.blueprint import draw_blueprint
from kvgen.backends.native import NativeBackend
from kvgen.checkpoint import RawCheckpoint, read_checkpoint
from kvgen.comparison.comparison import compare_ids
from kvgen.comparison.verdict import Verdict
from kvgen.kernels.lacking import lacking
from kvgen.loading.load import load
from tests import gguf_files
from tests.families import CASES, CONFIGS, make_checkpoint, make_model

# The order of sums differs between two implementations of the same fp32 arithmetic: about 1e-7 relative for each
# of some hundred operations, on logits of size 1 to 10.
TOLERANCE = 1e-4
LENGTH = 70  # longer than every window, and than LongRoPE's short length

# Of each kind, the cases after the first run only where slow tests run.
_SEEN = [kind for kind, _ in gguf_files.CONFIGS]
every_gguf_file = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, id=f"{kind}-{i}", marks=pytest.mark.slow if kind in _SEEN[:i] else ())
        for i, (kind, options) in enumerate(gguf_files.CONFIGS)
    ],
)
every_case = pytest.mark.parametrize(
    ("kind", "number"), [pytest.param(*case, marks=pytest.mark.slow if case[1] else ()) for case in CASES]
)

every_engine = pytest.mark.parametrize("kernels", ["cpp", "off"])
# What another test holds the fast tests' engine to, the other engine is held to where slow tests run.
cpp_or_slow = pytest.mark.parametrize("kernels", ["cpp", pytest.param("off", marks=pytest.mark.slow)])
off_or_slow = pytest.mark.parametrize("kernels", [pytest.param("cpp", marks=pytest.mark.slow), "off"])


def load_model(folder: Path, dtype: str = "float32", kernels: str = "auto") -> NativeBackend:
    """kernels `cpp`, if they lack a mechanism: checks that this is said, and skips the test."""
    missing = lacking(draw_blueprint(read_checkpoint(folder)).decoder.config)
    if kernels == "cpp" and missing is not None:
        with pytest.raises(UnsupportedError, match=f"the kernels lack: {missing}"):
            load(folder, dtype=dtype, tokenizer="ids", kernels=kernels)
        assert load(folder, dtype=dtype, tokenizer="ids").model.engine == f"torch (kernels lack: {missing})"
        pytest.skip(f"the kernels lack: {missing}")
    model = load(folder, dtype=dtype, tokenizer="ids", kernels=kernels).model
    assert isinstance(model, NativeBackend)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, Any]]:
    """Writes the checkpoint of a case, once; returns its folder and the model of transformers. Both are only read."""

    @cache
    def write(kind: str, number: int) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(kind)
        return folder, make_checkpoint(kind, number, folder)

    return write


@pytest.fixture(scope="module")
def expected_steps(
    checkpoint: Callable[[str, int], tuple[Path, Any]],
) -> Callable[[str, int], dict[int, torch.Tensor]]:
    """Computes logits after the first positions of `random_ids` by transformers, (B, vocab) each, by length."""

    @cache
    def compute(kind: str, number: int) -> dict[int, torch.Tensor]:
        _, reference = checkpoint(kind, number)
        lengths = (1, 2, 30, 47, 48, 49, 50, LENGTH)
        return {length: expected_logits(reference, random_ids()[:, :length])[:, -1] for length in lengths}

    return compute


def random_ids(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def expected_logits(reference: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return reference(ids, use_cache=False).logits


@every_engine
@every_case
def test_logits_equal_transformers(kind: str, number: int, kernels: str, checkpoint, expected_steps) -> None:
    folder, _ = checkpoint(kind, number)
    model = load_model(folder, kernels=kernels)
    ids = random_ids()
    actual = model.all_logits(ids)
    assert actual.abs().max() > 0.1
    cache = None
    for length, expected in expected_steps(kind, number).items():
        assert (actual[:, length - 1] - expected).abs().max() < TOLERANCE
        logits, cache = model(ids[:, :length], cache)
        assert (logits[:, 0] - expected).abs().max() < TOLERANCE


@cpp_or_slow
@every_case
def test_cached_equals_uncached_step_by_step(kind: str, number: int, kernels: str, checkpoint) -> None:
    folder, _ = checkpoint(kind, number)
    model = load_model(folder, kernels=kernels)
    ids = random_ids()
    uncached = model.all_logits(ids)
    cache = None
    for length in range(1, LENGTH + 1):
        cached, cache = model(ids[:, :length], cache)
        expected = uncached[:, length - 1 : length]
        assert (cached - expected).abs().max() < TOLERANCE
        assert kernels == "off" or torch.equal(cached, expected)  # the kernels sum in one order


@off_or_slow
@every_case
def test_edits_and_rewinds_change_nothing(kind: str, number: int, kernels: str, checkpoint) -> None:
    folder, _ = checkpoint(kind, number)
    model = load_model(folder, kernels=kernels)
    ids, cache = random_ids(), None
    for length, edited in ((40, 0), (70, 0), (67, 66), (70, 41), (12, 0), (33, 32), (70, 5)):
        ids[:, edited] = (ids[:, edited] + 1) % 96
        cached, cache = model(ids[:, :length], cache)
        uncached, _ = model(ids[:, :length], None)
        assert (cached - uncached).abs().max() < TOLERANCE


@off_or_slow
@every_gguf_file
def test_a_gguf_file_gives_the_logits_of_the_model_it_came_from(
    kind: str, options: dict[str, Any], kernels: str, tmp_path: Path
) -> None:
    reference = make_model(kind, options, seed=7)
    gguf_files.write_gguf(tmp_path / "tiny.gguf", kind, reference)
    model = load_model(tmp_path / "tiny.gguf", kernels=kernels)
    ids = random_ids()
    actual = model.all_logits(ids)
    for length in (1, 40, LENGTH):
        expected = expected_logits(reference, ids[:, :length])[:, -1]
        assert (actual[:, length - 1] - expected).abs().max() < TOLERANCE


@every_gguf_file
def test_quantized_weights_of_a_gguf_file_mean_the_same_on_the_kernels(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The kernels take codes as they are stored, torch takes what the gguf package makes of them."""
    reference = make_model(kind, options, seed=7)
    gguf_files.write_gguf(tmp_path / "tiny.gguf", kind, reference, type_=gguf.GGMLQuantizationType.Q8_0)
    ids = random_ids()
    logits = load_model(tmp_path / "tiny.gguf", kernels="cpp").all_logits(ids)
    expected = load_model(tmp_path / "tiny.gguf", kernels="off").all_logits(ids)
    differences = (logits - expected).abs().amax(-1)
    # Activations have 16 bits in each group, which may change the choice of experts at a few positions.
    assert differences.median() < 1e-3 * expected.abs().max()


@every_engine
@pytest.mark.parametrize("kind", ["llama", "qwen2", "cohere2", "glm4"])
def test_a_gguf_file_may_have_queries_keys_and_values_in_one_tensor(
    kind: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama.cpp's converter writes it with --fuse-qkv."""
    reference = make_model(kind, dict(gguf_files.CONFIGS)[kind])
    gguf_files.write_gguf(tmp_path / "apart.gguf", kind, reference)
    add_tensor = gguf.GGUFWriter.add_tensor
    parts: dict[str, list[np.ndarray]] = defaultdict(list)

    def add_fused(writer: gguf.GGUFWriter, name: str, array: np.ndarray, **options: Any) -> None:
        found = re.fullmatch(r"(blk\.\d+\.attn_)[qkv](\.\w+)", name)
        if found is None:
            return add_tensor(writer, name, array, **options)
        rows = parts[f"{found[1]}qkv{found[2]}"]
        rows.append(array)
        if len(rows) == 3:
            add_tensor(writer, f"{found[1]}qkv{found[2]}", np.concatenate(rows))

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_fused)
    gguf_files.write_gguf(tmp_path / "fused.gguf", kind, reference)
    apart, fused = (load_model(tmp_path / f"{name}.gguf", kernels=kernels) for name in ("apart", "fused"))
    assert parts
    assert torch.equal(fused.all_logits(random_ids()), apart.all_logits(random_ids()))


# `tests/test_compare.py` compares every mechanism; here are a few families that combine them.
_COMPARED = ("deepseek_v2", "gemma3_text", "granitemoehybrid", "llama")  # a kind of cache each


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "number"),
    [
        pytest.param(kind, number, marks=pytest.mark.slow if number or kind not in _COMPARED else ())
        for kind, number in CASES
    ],
)
def test_compare_finds_the_cache_right_and_the_wrong_pattern_wrong(
    kind: str, number: int, dtype: str, tmp_path: Path
) -> None:
    make_checkpoint(kind, number, tmp_path)
    prompt = random_ids(1, 12)[0].tolist()
    model = load_model(tmp_path, dtype)
    rows = compare_ids(model, prompt, patterns=("full-sequence", "last-token"), steps=45).rows
    config = model.decoder.config
    has_positions = config.rotaries or config.learned_positions
    wrong = Verdict.DIFFERENT if has_positions else Verdict.EQUIVALENT
    assert [row.verdict for row in rows[1:]] == [Verdict.EQUIVALENT, wrong]
    assert rows[1].findings == ()


JUNK = [None, True, -1, 0, 3, 10**12, 0.5, -2.5, "x", "", [], [1], ["full_attention"], {}, {"factor": 2}]


def with_junk(metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The metadata with each value, those inside of objects too, replaced by what should not be there."""
    for key, value in metadata.items():
        for junk in JUNK:
            yield {**metadata, key: junk}
        if isinstance(value, Mapping):
            yield from ({**metadata, key: changed} for changed in with_junk(value))


def count_refused(raw: RawCheckpoint) -> int:
    draw_blueprint(raw)
    refused = 0
    for metadata in with_junk(raw.metadata):
        try:
            draw_blueprint(replace(raw, metadata=metadata))
        except KvgenError as error:
            refused += 1
            assert "\n" not in str(error)
    return refused


@pytest.mark.slow
@every_case
def test_any_value_in_a_config_is_read_or_refused(kind: str, number: int, tmp_path: Path) -> None:
    make_checkpoint(kind, number, tmp_path)
    assert count_refused(read_checkpoint(tmp_path)) > 100


@pytest.mark.slow
@every_gguf_file
def test_any_value_in_a_gguf_file_is_read_or_refused(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    gguf_files.write_gguf(tmp_path / "tiny.gguf", kind, make_model(kind, options))
    assert count_refused(read_checkpoint(tmp_path / "tiny.gguf")) > 50


@pytest.mark.parametrize("kind", CONFIGS)
def test_more_layers_than_tensors_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    make_checkpoint(kind, 0, tmp_path)
    raw = read_checkpoint(tmp_path)
    key = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    with pytest.raises(CheckpointError, match="says 1000000000 layers, but holds"):
        draw_blueprint(raw.with_metadata({key: 10**9}))
