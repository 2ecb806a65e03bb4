"""One engine held against another: equal ones, rounded ones, and the causes of planted differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvgen
from kvgen import Loaded
from kvgen.comparison.crosscheck import Agreement, CrossCheck, cross_check
from kvgen.comparison.reference import Reference
from kvgen.comparison.subjects import subject_of
from kvgen.tokenizer.builtin import bytes_tokenizer
from tests.families import CONFIGS, make_model
from tests.program import run
from tests.test_compare import PROMPT

STEPS = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(9)).tolist()


def make(folder: Path, kind: str = "llama", seed: int = 0, **options: Any) -> Path:
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "max_position_embeddings": 256}
    make_model(kind, {**CONFIGS[kind][0], **plain, **options}, seed=seed).save_pretrained(folder)
    return folder


def edited(
    folder: Path, other: Path, *, tensors: Callable[[dict[str, Any]], None] | None = None, **fields: Any
) -> Path:
    """A copy of a checkpoint with other config fields, and tensors changed in place."""
    other.mkdir()
    (other / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | fields))
    weights = load_file(folder / "model.safetensors")
    if tensors is not None:
        tensors(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, other / "model.safetensors")
    return other


def opened(folder: Path, **options: Any) -> Loaded:
    return kvgen.load(folder, tokenizer="ids", kernels="off", **options)


def check(loaded: Loaded, reference: Loaded) -> CrossCheck:
    return cross_check(loaded, reference, [*PROMPT, *STEPS], len(PROMPT))


def names(found: CrossCheck) -> list[str]:
    return [finding.name for finding in found.findings]


@pytest.mark.parametrize("kind", ["llama", "mistral", "lfm2", "gpt2"])
def test_equal_engines_raise_no_alarm(kind: str, tmp_path: Path) -> None:
    make_model(kind, CONFIGS[kind][0]).save_pretrained(tmp_path)
    for options in ({}, {"dtype": "bfloat16"}):
        found = check(kvgen.load(tmp_path, tokenizer="ids"), opened(tmp_path, **options))
        assert (found.agreement, found.length) == (Agreement.EQUAL if not options else found.agreement, None)
        assert found.agreement is not Agreement.DIFFERENT
        assert found.gap.top1 > 0.5


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


def reverse_norm(weights: dict[str, Any]) -> None:
    weights["model.layers.1.input_layernorm.weight"] = weights["model.layers.1.input_layernorm.weight"].flip(0)


def double_head(weights: dict[str, Any]) -> None:
    weights["lm_head.weight"] = 2 * weights["lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "positions"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, "positions"),
        ({"tensors": reverse_norm}, "weights"),
        ({"tensors": double_head}, "scale"),
        ({"rms_norm_eps": 0.5}, "weights"),
        ({"hidden_act": "gelu"}, "weights"),
    ],
    ids=["rope-base", "rope-scaling", "reversed-norm", "scaled-logits", "norm-epsilon", "activation"],
)
def test_planted_differences_are_found_with_their_cause(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    right = make(tmp_path / "right", tie_word_embeddings=False)
    found = check(opened(edited(right, tmp_path / "wrong", **change)), opened(right))
    assert (found.agreement, names(found)) == (Agreement.DIFFERENT, [cause])
    assert found.length == (2 if cause == "positions" else 1)


def test_a_missing_window_is_found_where_it_begins(tmp_path: Path) -> None:
    right = make(tmp_path / "right", "mistral", sliding_window=19)
    found = check(opened(edited(right, tmp_path / "wrong", sliding_window=None)), opened(right))
    assert (found.agreement, names(found), found.length) == (Agreement.DIFFERENT, ["window"], 20)
    assert "up to 19 tokens" in found.findings[0].text


def test_other_weights_are_named(tmp_path: Path) -> None:
    found = check(opened(make(tmp_path / "a")), opened(make(tmp_path / "b", seed=1)))
    assert (found.agreement, names(found), found.length) == (Agreement.DIFFERENT, ["other weights"], 1)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"kv_dtype": "bfloat16"}, "arithmetic", "keys and values rounded to 16 bits"),
        ({"kv_dtype": "int8"}, "arithmetic", "keys and values rounded to 8 bits"),
        ({"quantize": "int8", "kernels": "auto"}, "weights", "weights rounded to 8 bits"),
        ({"quantize": "int4", "kernels": "auto"}, "weights", "weights rounded to 4 bits"),
        ({"dtype": "bfloat16"}, "weights", "weights rounded to bfloat16"),
    ],
)
def test_rounding_is_measured_and_named(options: dict[str, Any], kind: str, words: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    found = check(kvgen.load(folder, tokenizer="ids", **options), opened(folder))
    assert (found.agreement, names(found)) == (Agreement.ROUNDED, [kind])
    assert words in found.findings[0].text


def sharpen(weights: dict[str, Any]) -> None:
    for name in weights:
        if "q_proj" in name or "k_proj" in name:
            weights[name] = 60 * weights[name]


@pytest.mark.parametrize("seed", range(4))
def test_rounding_that_a_sharp_softmax_enlarges_is_no_difference(seed: int, tmp_path: Path) -> None:
    folder = edited(make(tmp_path / "plain", seed=seed), tmp_path / "sharp", tensors=sharpen)
    found = check(kvgen.load(folder, tokenizer="ids"), opened(folder))
    assert (found.agreement, names(found)) == (Agreement.EQUAL, [])


def tie(weights: dict[str, Any]) -> None:
    for name in weights:
        if name.endswith("gate.weight"):
            weights[name] = weights[name][:1].repeat(len(weights[name]), 1)


def test_tied_experts_are_not_called_rounded_weights(tmp_path: Path) -> None:
    folder = edited(make(tmp_path / "plain", "mixtral"), tmp_path / "tied", tensors=tie)
    found = check(kvgen.load(folder, tokenizer="ids"), opened(folder))
    assert (found.agreement, names(found)) == (Agreement.ROUNDED, ["order of sums"])


def test_a_prompt_of_other_tokens_is_said_first(tmp_path: Path) -> None:
    loaded = opened(make(tmp_path, vocab_size=256))
    other = Loaded(loaded.model, bytes_tokenizer(), loaded.source)
    found = cross_check(loaded, other, [*PROMPT, *STEPS], len(PROMPT), "5 17")
    assert (found.agreement, names(found)) == (Agreement.DIFFERENT, ["tokenizer"])
    assert found.gap.max_abs == 0


def test_a_larger_vocabulary_is_no_difference(tmp_path: Path) -> None:
    right = make(tmp_path / "right", vocab_size=64, tie_word_embeddings=False)

    def pad(weights: dict[str, Any]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name] = torch.cat((weights[name], weights[name][:8]))

    found = check(opened(edited(right, tmp_path / "wide", tensors=pad, vocab_size=72)), opened(right))
    assert (found.agreement, names(found)) == (Agreement.EQUAL, ["vocabulary"])


def test_the_noise_floor_takes_in_another_implementation(tmp_path: Path) -> None:
    subject = subject_of(opened(make(tmp_path)).model)
    ids = subject.backend.ids_tensor(PROMPT)
    alone = Reference(subject).noise_floor(ids)
    subject.rounded_otherwise = lambda ids: subject.uncached(ids)[0, -1] + 0.01  # type: ignore[method-assign]
    assert Reference(subject).noise_floor(ids) == pytest.approx(0.01, rel=1e-3) != alone


RANDOM = """
import torch

class Model:
    vocab_size = 50
    def __init__(self):
        self.table = torch.randn(50, 50)
    def __call__(self, ids, cache=None):
        return self.table[ids], None

def make():
    return Model()
"""


def test_the_command_reports_it_in_every_form(tmp_path: Path) -> None:
    folder, page, junit = make(tmp_path / "model"), tmp_path / "page.html", tmp_path / "junit.xml"
    command = ("compare", "-m", str(folder), "--ids", "-p", "5 17 3 40", "-n", "6", "--kv-dtype", "int8")
    result = run(*command, "--reference", "native", "--json", "--html", str(page), "--junit", str(junit))
    assert (result.returncode, result.stderr) == (0, "")
    check = json.loads(result.stdout)["comparisons"][0]["cross_check"]
    assert (check["reference"], check["verdict"], check["first_difference"]) == ("native", "rounded differently", None)
    assert check["logits"]["max_abs"] > 0
    for written in (page.read_text(), junit.read_text(), run(*command, "--reference", "native").stdout):
        assert "gainst native" in written
    assert "keys and values rounded to 8 bits" in page.read_text()
    assert json.loads(run(*command, "--json").stdout)["comparisons"][0]["cross_check"] is None


def test_a_reference_that_differs_makes_the_command_fail(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text(RANDOM)  # other weights each time that it is loaded
    command = ("compare", "-m", f"{tmp_path}/random.py:make", "--ids", "-p", "5 17 3 40", "-n", "4")
    assert run(*command).returncode == 0
    result = run(*command, "--reference", "native")
    assert (result.returncode, result.stderr) == (1, "")
    assert "against python: different." in result.stdout
    assert "The weights are others" in result.stdout


def test_an_adapter_needs_a_reference_that_has_it(tmp_path: Path) -> None:
    result = run("compare", "-m", str(make(tmp_path)), "--ids", "-p", "5", "--adapter", "x", "--reference", "llama.cpp")
    assert result.returncode == 2
    assert "--adapter belongs to kvgen's own decoder, not to --reference llama.cpp" in result.stderr
