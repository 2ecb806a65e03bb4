"""`kvgen.testing` as the author of another library uses it: in tests of their own, run by pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvgen import UsageError
from kvgen.testing import assert_cache_correct
from tests.faults import SmallDecoder
from tests.program import run_python

TESTS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.faults import SmallDecoder

def test_right(assert_cache_correct):
    assert_cache_correct(SmallDecoder, steps=12)

def test_wrong(assert_cache_correct):
    assert_cache_correct(SmallDecoder("positions restart at 0"), steps=12)
"""


def test_the_fixture_passes_a_right_cache_and_explains_a_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS)
    monkeypatch.chdir(tmp_path)
    result = run_python("import pytest; pytest.console_main()", "-q", "-p", "no:cacheprovider", "test_mine.py")
    assert "1 failed, 1 passed" in result.stdout, result.stdout + result.stderr
    assert "full-sequence: different" in result.stdout
    assert "The position offset is lost: the new token is computed at position 0" in result.stdout


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, kvgen.testing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "make", [SmallDecoder, SmallDecoder(), lambda: SmallDecoder()], ids=["class", "model", "factory"]
)
def test_a_model_or_what_makes_one_is_given(make: Any) -> None:
    comparison = assert_cache_correct(make, [5, 17, 3, 8, 40, 2], steps=8)
    assert comparison.steps == 8 and comparison.acceptable


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_a_prompt_may_be_a_tensor_of_one_row(shape: tuple[int, ...]) -> None:
    ids = torch.tensor([5, 17, 3, 8, 40, 2])
    assert assert_cache_correct(SmallDecoder, ids.reshape(shape), steps=4).ids[:6] == tuple(ids.tolist())
    with pytest.raises(UsageError, match="shape"):
        assert_cache_correct(SmallDecoder, ids.reshape(2, 3), steps=4)


def test_a_model_that_is_not_deterministic_fails() -> None:
    class Random(SmallDecoder):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            logits, cache = super().forward(*arguments, **options)
            return logits + torch.rand(1), cache

    with pytest.raises(AssertionError, match="not comparable"):
        assert_cache_correct(Random())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="int is not a model"):
        assert_cache_correct(3)
