"""`kvgen score` against transformers, and its windows against their definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from torch import Tensor

import kvgen
from kvgen import ModelError, Score, Tokenizer, UsageError
from kvgen.backends.native import NativeBackend
from kvgen.backends.python import PythonBackend
from kvgen.cli.surprise import heat_map, table
from kvgen.generation.scoring import windows
from tests.conftest import CORPUS
from tests.sizes import examples
from tests.test_cache import make_decoder


def score_ids(model: kvgen.Backend, ids: Sequence[int], **options: Any) -> Score:
    """Score token ids with a model that has no tokenizer."""
    return kvgen.score(kvgen.Loaded(model, None, "test"), ids, **options)


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


@torch.inference_mode()
def each(reference: Any, ids: list[int]) -> list[float]:
    """Log-probabilities of all ids but the first by transformers' model, in one pass."""
    rows = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)
    return [float(rows[index, id_]) for index, id_ in enumerate(ids[1:])]


@pytest.mark.slow
@pytest.mark.parametrize(("window", "stride"), [(2048, 1024), (128, 64), (100, 100), (64, 17), (64, 7)])
def test_log_likelihood_equals_transformers(
    smollm2_on_torch: kvgen.Loaded, smollm2_reference: Any, window: int, stride: int
) -> None:
    ids = smollm2_on_torch.tokenizer.encode(STORY)[:300]
    result = score_ids(smollm2_on_torch.model, ids, window=window, stride=stride)
    total, count = guide(smollm2_reference, ids, window, stride)
    assert result.count == count
    assert result.total == pytest.approx(total, abs=1e-3)
    assert result.perplexity == pytest.approx(math.exp(-total / count), rel=1e-5)


@pytest.mark.slow
def test_each_tokens_log_probability_equals_transformers(
    smollm2_on_torch: kvgen.Loaded, smollm2_reference: Any
) -> None:
    ids = smollm2_on_torch.tokenizer.encode(STORY)[:200]
    result = score_ids(smollm2_on_torch.model, ids)
    assert result.logprobs[0] is None
    assert result.logprobs[1:] == pytest.approx(each(smollm2_reference, ids), abs=1e-4)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (64, None), (40, 40), (33, 10)])
def test_a_tiny_model_scores_as_in_transformers(
    tiny_llama: Callable[..., tuple[Path, Any]], window: int | None, stride: int | None
) -> None:
    folder, reference = tiny_llama()
    loaded = kvgen.load(folder)
    ids = loaded.tokenizer.encode(STORY)[:400]
    result = score_ids(loaded.model, ids, window=window, stride=stride)
    total, count = guide(reference, ids, window or 512, stride or (window or 512) // 2)
    assert (result.count, result.window) == (count, window or 512)
    assert result.total == pytest.approx(total, abs=1e-3)
    if window is None:
        assert result.logprobs[1:] == pytest.approx(each(reference, ids), abs=1e-4)


@settings(max_examples=examples(300))
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
    assert score_ids(MODEL, IDS, window=90).logprobs[1:] == pytest.approx(expected, abs=1e-5)


def test_a_stride_of_a_window_scores_windows_apart() -> None:
    result = score_ids(MODEL, IDS, window=30, stride=30)
    parts = [score_ids(MODEL, IDS[start : start + 30], window=30).logprobs for start in (0, 30, 60)]
    assert [value is None for value in result.logprobs] == [index % 30 == 0 for index in range(90)]
    assert result.logprobs == tuple(value for part in parts for value in part)


class LastOnly(NativeBackend):
    """A model that gives the last position's logits alone."""

    def each_logits(self, ids: Tensor, positions: Sequence[int]) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(("window", "stride"), [(90, 45), (30, 10)])
def test_a_model_that_gives_one_position_at_a_time_scores_the_same(window: int, stride: int) -> None:
    expected = score_ids(MODEL, IDS, window=window, stride=stride)
    actual = score_ids(LastOnly(MODEL.module), IDS, window=window, stride=stride)
    assert actual.logprobs[0] is expected.logprobs[0] is None
    assert actual.logprobs[1:] == pytest.approx(expected.logprobs[1:], abs=1e-4)


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
        score_ids(MODEL, IDS, **options)
    with pytest.raises(UsageError, match="at least two tokens"):
        score_ids(MODEL, IDS[:1])


def flat(**changes: float) -> PythonBackend:
    """A model of 8 tokens, all as likely, but for the logits that `changes` names: t3=-inf."""

    def model(ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        logits = torch.zeros(1, ids.shape[1], 8)
        for name, value in changes.items():
            logits[..., int(name[1:])] = value
        return logits, None

    return PythonBackend(model)


def test_what_is_not_a_number_is_an_error_and_no_score() -> None:
    with pytest.raises(ModelError, match="not finite"):
        score_ids(flat(t3=math.nan), [1, 2])
    with pytest.raises(ModelError, match="8 logits, too few for token id 8"):
        score_ids(flat(), [1, 8])


def test_what_a_model_rules_out_is_infinitely_surprising() -> None:
    result = score_ids(flat(t3=-math.inf), [1, 2, 3])
    assert result.logprobs == (None, pytest.approx(-math.log(7)), -math.inf)
    assert (result.total, result.perplexity) == (-math.inf, math.inf)
    assert score_ids(flat(t3=-1000.0), [1, 3]).perplexity == math.inf  # beyond float64


def test_bits_per_byte_count_the_tokens_that_are_not_scored_too() -> None:
    result = score_ids(flat(), [1, 2, 3, 4], window=2)
    assert result.perplexity == pytest.approx(8)
    assert result.bits_per_byte(4, 6) == pytest.approx(4 * 3 / 6)


def test_a_model_without_bounds_takes_any_window() -> None:
    assert score_ids(flat(), [1, 2]).window == 2048
    assert score_ids(flat(), [1, 2], window=10**6).stride == 500_000
    with pytest.raises(UsageError, match="2 or more"):
        score_ids(flat(), [1, 2], window=1)


def test_progress_is_told_after_each_window() -> None:
    told: list[tuple[int, int]] = []
    score_ids(MODEL, IDS, window=40, stride=20, progress=lambda done, total: told.append((done, total)))
    assert told == [(40, 90), (60, 90), (80, 90), (90, 90)]


# --- For eyes ----------------------------------------------------------------------------------------------------


def byte_fallback() -> Tokenizer:
    """A SentencePiece-style vocabulary of few letters: what it lacks becomes bytes. A text begins with a space."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh"]
    backend = tokenizers.Tokenizer(models.BPE({token: id_ for id_, token in enumerate(tokens)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, frozenset())


@pytest.fixture(params=["byte-level", "byte-fallback"])
def vocabulary(request: pytest.FixtureRequest, tiny_tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(tiny_tokenizer, frozenset()) if request.param == "byte-level" else byte_fallback()


@pytest.mark.parametrize("text", CORPUS)
def test_pieces_are_whole_characters_and_add_up_to_the_text(vocabulary: Tokenizer, text: str) -> None:
    ids = tuple(vocabulary.encode(text))
    parts = list(vocabulary.pieces(ids))
    assert "".join(piece for piece, _ in parts) == vocabulary.decode(ids)
    assert [place for _, places in parts for place in places] == list(range(len(ids)))
    assert not any("\ufffd" in piece for piece, _ in parts)
    assert all(len(places) <= 4 for _, places in parts)


def test_the_token_after_a_run_of_bytes_is_a_piece_of_its_own() -> None:
    vocabulary = byte_fallback()
    assert [piece for piece, _ in vocabulary.pieces(vocabulary.encode("a日本 b"))] == [*("", "a", "日", "本", " ", "b")]


def test_pieces_show_special_tokens_and_what_is_no_text(tiny_tokenizer: tokenizers.Tokenizer) -> None:
    vocabulary = Tokenizer(tiny_tokenizer, frozenset())
    a, broken = vocabulary.encode("a"), vocabulary.encode("日")[:1]
    found = list(vocabulary.pieces((0, *a, *broken, 1, *a, *broken)))
    assert found == [
        ("<s>", range(1)),
        ("a", range(1, 2)),
        ("\ufffd", range(2, 3)),
        ("</s>", range(3, 4)),
        ("a", range(4, 5)),
        ("\ufffd", range(5, 6)),
    ]


def test_what_never_becomes_a_character_is_held_back_for_four_tokens(tiny_tokenizer: tokenizers.Tokenizer) -> None:
    vocabulary = Tokenizer(tiny_tokenizer, frozenset())
    broken = vocabulary.encode("日")[:1] * 6
    assert list(vocabulary.pieces(broken)) == [("\ufffd" * 4, range(4)), ("\ufffd" * 2, range(4, 6))]


def test_a_character_is_as_surprising_as_its_tokens_together() -> None:
    vocabulary = byte_fallback()
    ids = tuple(vocabulary.encode("a日\nb"))  # a space, a, three bytes, one byte, b
    nats = [None, -0.1, *(bits * -math.log(2) for bits in (3, 3, 3, 0.5)), None]
    result = Score(ids, tuple(nats), 8, 4)
    shown = heat_map(result, vocabulary)
    styles = {shown.plain[span.start : span.end]: span.style for span in shown.spans}
    assert styles == {
        "a": "white on color(22)",
        "日": "white on color(130)",
        "\u23ce\n": "white on color(22)",
        "b": "dim",
    }
    assert heat_map(result, vocabulary, coloured=False).plain == shown.plain.replace("日", "日\u2089")
    lines = [line.split(maxsplit=3) for line in table(result, vocabulary)]
    assert [line[1] for line in lines] == ["-", "0.14", "3.00", "3.00", "3.00", "0.50", "-"]
    assert [line[3] for line in lines[1:]] == ["a", "日 (1/3)", "日 (2/3)", "日 (3/3)", "\\n", "b"]


def test_text_and_its_ids_are_scored_alike(smollm2: kvgen.Loaded) -> None:
    text = "The capital of France is Paris."
    assert kvgen.score(smollm2, text) == kvgen.score(smollm2, smollm2.tokenizer.encode(text))
    with pytest.raises(UsageError, match="window is '9'"):
        kvgen.score(smollm2, text, window="9")
