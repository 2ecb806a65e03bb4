"""Every family against transformers, in fp32: logits, and the cache past the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvgen.backends.native import NativeBackend
from kvgen.compare.comparison import compare
from kvgen.compare.verdict import Verdict
from kvgen.loading import load
from tests import gguf_files
from tests.families import CASES, make_checkpoint, make_model

# The order of sums differs between two implementations of the same fp32 arithmetic: about 1e-7 relative for each
# of some hundred operations, on logits of size 1 to 10.
TOLERANCE = 1e-4
LENGTH = 70  # longer than every window, and than LongRoPE's short length

every_case = pytest.mark.parametrize(("kind", "number"), CASES)


def load_model(folder: Path, dtype: str = "float32") -> NativeBackend:
    model = load(folder, dtype=dtype, tokenizer="ids").model
    assert isinstance(model, NativeBackend)
    return model


def random_ids(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def expected_logits(reference: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return reference(ids, use_cache=False).logits


@every_case
def test_logits_equal_transformers(kind: str, number: int, tmp_path: Path) -> None:
    reference = make_checkpoint(kind, number, tmp_path)
    model = load_model(tmp_path)
    ids = random_ids()
    actual = model.all_logits(ids)
    assert actual.abs().max() > 0.1
    cache = None
    for length in (1, 2, 30, 47, 48, 49, 50, LENGTH):
        expected = expected_logits(reference, ids[:, :length])
        assert (actual[:, length - 1] - expected[:, -1]).abs().max() < TOLERANCE
        logits, cache = model(ids[:, :length], cache)
        assert (logits[:, 0] - expected[:, -1]).abs().max() < TOLERANCE


@every_case
def test_cached_equals_uncached_step_by_step(kind: str, number: int, tmp_path: Path) -> None:
    make_checkpoint(kind, number, tmp_path)
    model = load_model(tmp_path)
    ids = random_ids()
    cache = None
    for length in range(1, LENGTH + 1):
        cached, cache = model(ids[:, :length], cache)
        uncached, _ = model(ids[:, :length], None)
        assert (cached - uncached).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "options"),
    gguf_files.CONFIGS,
    ids=[f"{kind}-{number}" for number, (kind, _) in enumerate(gguf_files.CONFIGS)],
)
def test_a_gguf_file_gives_the_logits_of_the_model_it_came_from(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    reference = make_model(kind, options, seed=7)
    gguf_files.write_gguf(tmp_path / "tiny.gguf", kind, reference)
    model = load_model(tmp_path / "tiny.gguf")
    ids = random_ids()
    actual = model.all_logits(ids)
    for length in (1, 40, LENGTH):
        expected = expected_logits(reference, ids[:, :length])[:, -1]
        assert (actual[:, length - 1] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_case
def test_compare_finds_the_cache_right_and_the_wrong_pattern_wrong(
    kind: str, number: int, dtype: str, tmp_path: Path
) -> None:
    make_checkpoint(kind, number, tmp_path)
    prompt = random_ids(1, 12)[0].tolist()
    rows = compare(load_model(tmp_path, dtype), prompt, patterns=("full-sequence", "last-token"), steps=45).rows
    assert [row.verdict for row in rows[1:]] == [Verdict.EQUIVALENT, Verdict.DIFFERENT]
    assert rows[1].findings == ()
