"""`kvgen score` against transformers, and its windows against their definition."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvgen
from kvgen import UsageError
from kvgen.backends.native import NativeBackend
from kvgen.scoring import score, windows
from tests.conftest import CORPUS
from tests.test_cache import make_decoder

STORY = "\n".join(CORPUS[:14])


@torch.inference_mode()
def guide(reference: Any, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Log-likelihood and tokens by the loop of transformers' guide, with its model's own loss."""
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        text = torch.tensor([ids[begin:end]])
        labels = text.clone()
        labels[:, : -(end - previous)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        total -= float(reference(text, labels=labels).loss) * scored
        count += scored
        previous = end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(("window", "stride"), [(2048, 1024), (128, 64), (100, 100), (64, 7)])
def test_log_likelihood_equals_transformers(
    smollm2: kvgen.Loaded, smollm2_reference: Any, window: int, stride: int
) -> None:
    reference, _ = smollm2_reference
    ids = smollm2.tokenizer.encode(STORY)[:300]
    result = score(smollm2.model, ids, window=window, stride=stride)
    total, count = guide(reference, ids, window, stride)
    assert result.count == count
    assert result.total == pytest.approx(total, abs=1e-3)
    assert result.perplexity == pytest.approx(math.exp(-total / count), rel=1e-5)


def test_each_tokens_log_probability_equals_transformers(smollm2: kvgen.Loaded, smollm2_reference: Any) -> None:
    reference, _ = smollm2_reference
    ids = smollm2.tokenizer.encode(STORY)[:200]
    with torch.inference_mode():
        rows = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)
    expected = [float(rows[index, id_]) for index, id_ in enumerate(ids[1:])]
    result = score(smollm2.model, ids)
    assert result.logprobs[0] is None
    assert result.logprobs[1:] == pytest.approx(expected, abs=1e-3)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 400), st.integers(1, 100), st.data())
def test_windows_hold_each_token_first_exactly_once(count: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    seen: list[int] = []
    for begin, first, end in windows(count, window, stride):
        assert begin <= first < end <= begin + window
        assert begin % stride == 0
        assert begin == 0 or first - begin >= window - stride
        seen += range(first, end)
    assert seen == list(range(count))


MODEL = NativeBackend(make_decoder())
IDS = torch.randint(0, 50, (90,), generator=torch.Generator().manual_seed(2)).tolist()


def test_one_window_is_one_pass() -> None:
    rows = torch.log_softmax(MODEL.all_logits(torch.tensor([IDS]))[0], -1)
    expected = [float(rows[index, id_]) for index, id_ in enumerate(IDS[1:])]
    assert score(MODEL, IDS, window=90).logprobs[1:] == pytest.approx(expected, abs=1e-5)


def test_a_stride_of_a_window_scores_windows_apart() -> None:
    result = score(MODEL, IDS, window=30, stride=30)
    parts = [score(MODEL, IDS[start : start + 30], window=30).logprobs for start in (0, 30, 60)]
    assert [value is None for value in result.logprobs] == [index % 30 == 0 for index in range(90)]
    assert result.logprobs == tuple(value for part in parts for value in part)


class LastOnly(NativeBackend):
    """A model that gives the last position's logits alone."""

    def all_logits(self, ids: Tensor) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(("window", "stride"), [(90, 45), (30, 10)])
def test_a_model_that_gives_one_position_at_a_time_scores_the_same(window: int, stride: int) -> None:
    expected = score(MODEL, IDS, window=window, stride=stride)
    actual = score(LastOnly(MODEL.module), IDS, window=window, stride=stride)
    assert actual.count == expected.count
    assert actual.total == pytest.approx(expected.total, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window of 1"),
        ({"window": 5000}, "2 to 1024"),
        ({"stride": 0}, "stride of 0"),
        ({"window": 10, "stride": 11}, "1 to the window, 10"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        score(MODEL, IDS, **options)
    with pytest.raises(UsageError, match="at least two tokens"):
        score(MODEL, IDS[:1])


# --- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_llama) -> str:
    return str(tiny_llama()[0])


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvgen", "score", *arguments], capture_output=True, text=True, check=False, **options
    )


def test_a_text_comes_from_where_the_options_say(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Hello, world!\n")
    results = [
        run("-m", tiny, str(tmp_path / "text")),
        run("-m", tiny, "-p", "Hello, world!"),
        run("-m", tiny, input="Hello, world!\n"),
        run("-m", tiny, "-", input="Hello, world!"),
    ]
    assert len({result.stdout for result in results}) == 1
    assert results[0].stdout.startswith("log-likelihood -")
    assert results[0].stdout.count("\n") == 1


def test_lines_of_json_are_scored_in_order_with_their_fields(tiny: str) -> None:
    lines = ['{"text": "Hello, world!", "id": 7}', '"The quick brown fox"', '{"id": 9, "text": "naïve"}']
    result = run("-m", tiny, "--jsonl", "--tokens", input="\n".join(lines))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer.get("id") for answer in answers] == [7, None, 9]
    assert [answer["text"] for answer in answers] == ["Hello, world!", "The quick brown fox", "naïve"]
    for answer in answers:
        values = [entry["logprob"] for entry in answer["logprobs"]]
        assert values[0] is None
        assert sum(values[1:]) == pytest.approx(answer["log_likelihood"])
        assert answer["perplexity"] == pytest.approx(math.exp(-answer["log_likelihood"] / answer["tokens"]))


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        (["--jsonl"], '{"text": "fine"}\nnot json', 2, "line 2: not JSON"),
        (["--jsonl"], '{"txt": "x"}', 2, 'line 1: give {"text": "..."} or a string'),
        (["-p", "a", "file"], "", 2, "not both"),
        (["no-such-file"], "", 1, "no-such-file: cannot be read"),
        (["-p", "a"], "", 2, "at least two tokens"),
        (["-p", "Hello, world!", "--window", "9999"], "", 2, "window of 9999 tokens does not fit"),
    ],
)
def test_errors_are_one_line(tiny: str, arguments: list[str], stdin: str, code: int, message: str) -> None:
    result = run("-m", tiny, *arguments, input=stdin)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_tokens_are_a_line_each(tiny: str) -> None:
    result = run("-m", tiny, "-p", "a\nb \x1b[31m", "--tokens")
    *rows, last = result.stdout.splitlines()
    assert last.startswith("log-likelihood")
    assert "\x1b" not in result.stdout
    assert rows[0].split()[:2] == ["-", "-"]
    assert all(float(row.split()[1]) >= 0 for row in rows[1:])


def test_a_terminal_shows_the_text_in_colours_and_nothing_that_steers_it(tiny: str) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvgen", "score", "-m", tiny, "-p", "日本 [red]x[/] \x1b]0;title\x07", "-q"],
        stdout=follower,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode()
    assert "48;5;" in text  # a coloured ground
    assert "bits of surprise" in text
    assert "\x1b]0;" not in text
    assert "日本 [red]x[/] " in re.sub(r"\x1b\[[\d;]*m", "", text)
