"""`compare --backend transformers`: correct models, seeded faults, and what the library refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import tiny_config, tiny_model
from benchmarks.survey import agrees, examine
from kvgen.comparison.comparison import Comparison, compare_ids
from kvgen.comparison.engines import EngineOptions, load_engine
from kvgen.comparison.engines.transformers import TransformersSubject
from kvgen.comparison.engines.transformers_cache import cache_names
from kvgen.comparison.engines.transformers_model import TransformersBackend
from kvgen.comparison.verdict import Verdict
from kvgen.errors import UnsupportedError, UsageError
from tests.program import run
from tests.transformers_faults import FAULTS

PROMPT = [5, 17, 3, 40, 22, 61, 9, 33]
FEW = ("a layer reads another", "crop leaves one token", "window one too short", "position one too far")
_AUTO = """
    llama mistral gemma2 lfm2 qwen3_next gpt2 bloom opt mixtral deepseek_v3 gemma gemma3_text qwen2 qwen3 phi phi3
    gpt_neox gptj codegen cohere cohere2 olmo2 olmoe granite bamba mamba2 gpt_oss starcoder2 stablelm falcon bart bert
"""
_STATIC = "llama mistral gemma2 gemma3_text qwen2 gpt2 olmo2 phi3 cohere2 gpt_oss"
CORRECT = [f"{name}:{cache}" for cache, names in (("auto", _AUTO), ("static", _STATIC)) for name in names.split()]


def compare(name: str, cache: str = "auto", *patterns: str, **options: Any) -> Comparison:
    backend = TransformersBackend(tiny_model(name), cache)
    return compare_ids(backend, PROMPT, patterns=patterns or ("full-sequence",), steps=20, **options)


def folder(path: Path, name: str = "llama", **settings: Any) -> Path:
    tiny_model(name, **settings).save_pretrained(path)
    return path


def slow(values: list[str], fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(value, marks=() if value in fast else pytest.mark.slow) for value in values]


@pytest.mark.parametrize("which", slow(CORRECT, ("llama:auto", "gemma2:static", "lfm2:auto")))
def test_correct_models_raise_no_alarm(which: str) -> None:
    row = compare(*which.split(":")).rows[1]
    assert row.verdict is Verdict.EQUIVALENT, row.findings


@pytest.mark.slow
@pytest.mark.parametrize("which", ["llama:auto", "llama:static", "mistral:auto", "gpt2:auto", "lfm2:auto"])
def test_correct_models_raise_no_thorough_alarm(which: str) -> None:
    row = compare(*which.split(":"), thorough=True).rows[1]
    assert row.verdict is Verdict.EQUIVALENT, row.findings
    checked = {probe.name for probe in row.probes if probe.ratio is not None}
    assert {"left padding", "saved and loaded", "rows in another order"} <= checked


def found(fault: str, monkeypatch: pytest.MonkeyPatch, *, thorough: bool) -> tuple[Verdict, set[str]]:
    FAULTS[fault].plant(monkeypatch)
    row = compare(FAULTS[fault].model, FAULTS[fault].cache, thorough=thorough).rows[1]
    return row.verdict, {finding.name for finding in row.findings}


@pytest.mark.parametrize("fault", slow([name for name, fault in FAULTS.items() if not fault.thorough], FEW))
def test_finds_faults_by_default(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, findings = found(fault, monkeypatch, thorough=False)
    assert verdict is Verdict.DIFFERENT
    assert findings & (FAULTS[fault].names | {"unexplained"})


@pytest.mark.slow
@pytest.mark.parametrize("fault", [name for name, fault in FAULTS.items() if fault.thorough])
def test_finds_the_other_faults_thoroughly(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, findings = found(fault, monkeypatch, thorough=True)
    assert verdict is Verdict.DIFFERENT
    assert findings & FAULTS[fault].names


def sharpened(name: str) -> TransformersBackend:
    """A model with scores of attention so large that it makes much of a rounding."""
    net = tiny_model(name)
    with torch.no_grad():
        for part, weight in net.named_parameters():
            if part.endswith(("q_proj.weight", "k_proj.weight")):
                weight *= 10
    return TransformersBackend(net)


@pytest.mark.parametrize("name", slow(["qwen2", "llama", "mistral"], ("qwen2",)))
def test_roundings_that_a_model_enlarges_are_no_fault(name: str) -> None:
    row = compare_ids(sharpened(name), PROMPT, patterns=["full-sequence"], steps=24).rows[1]
    assert row.verdict is Verdict.EQUIVALENT


def in_16_bits(name: str) -> TransformersBackend:
    """A model that computes in bfloat16 and returns logits in float32."""
    backend = TransformersBackend(tiny_model(name).to(torch.bfloat16))
    backend.net.lm_head.register_forward_hook(lambda part, inputs, output: output.float())
    backend.dtype = torch.float32
    return backend


def with_activations_of_8_bits(name: str) -> TransformersBackend:
    def rounded(part: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127
        return ((inputs[0] / scale).round() * scale,)

    net = tiny_model(name)
    for part in net.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(rounded)
    return TransformersBackend(net)


@pytest.mark.parametrize("make", [in_16_bits, with_activations_of_8_bits])
@pytest.mark.parametrize("name", slow(["qwen3", "llama"], ("qwen3",)))
def test_models_that_round_to_few_bits_raise_no_alarm(make: Callable[[str], TransformersBackend], name: str) -> None:
    row = compare_ids(make(name), PROMPT, patterns=["full-sequence"], steps=24).rows[1]
    assert row.verdict is Verdict.EQUIVALENT, (row.reason, row.findings)


def test_faults_that_16_bits_hide_in_a_probe_are_found() -> None:
    backend = TransformersBackend(tiny_model("mamba").to(torch.bfloat16))  # wrong with several new tokens
    row = compare_ids(backend, PROMPT, patterns=["full-sequence"], steps=24).rows[1]
    assert row.verdict is Verdict.DIFFERENT
    assert [probe.name for probe in row.probes if probe.wrong] == ["several new tokens at once"]


def test_a_model_in_float64_is_judged_by_what_the_library_computes_in_float32() -> None:
    backend = TransformersBackend(tiny_model("gptj").double())
    assert compare_ids(backend, PROMPT, patterns=["full-sequence"], steps=24).rows[1].verdict is Verdict.EQUIVALENT


def test_faults_are_found_where_a_model_enlarges_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS["a layer reads another"].plant(monkeypatch)
    row = compare_ids(sharpened("qwen2"), PROMPT, patterns=["full-sequence"], steps=24).rows[1]
    assert row.verdict is Verdict.DIFFERENT


ROPE = {"rope_theta": 10000.0}


def test_scaling_that_depends_on_length_is_held_against_texts_of_each_length() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
    long = {"rope_type": "longrope", "partial_rotary_factor": 1.0, **factors, **ROPE}
    right = TransformersBackend(
        tiny_model("phi3", rope_parameters=long, max_position_embeddings=256, original_max_position_embeddings=32)
    )
    assert right.rope_changes_at == (32,)
    assert compare_ids(right, PROMPT, steps=32).rows[1].verdict is Verdict.EQUIVALENT
    dynamic = {"rope_type": "dynamic", "factor": 2.0, **ROPE}
    wrong = TransformersBackend(tiny_model("llama", rope_parameters=dynamic, max_position_embeddings=32))
    assert (wrong.rope_changes_at, wrong.context_length) == ((32,), 64)
    row = compare_ids(wrong, PROMPT, steps=16).rows[1]  # its cache keeps keys that were scaled for shorter texts
    assert row.verdict is Verdict.DIFFERENT
    assert {"longer texts", "stale context"} & {finding.name for finding in row.findings}


def test_the_last_token_alone_is_harmless_and_a_wrong_position_is_named() -> None:
    _, last_token, wrong_offset = compare("llama", "auto", "last-token", "wrong-offset").rows
    assert last_token.verdict is Verdict.EQUIVALENT
    assert [finding.name for finding in last_token.findings] == ["harmless here"]
    assert wrong_offset.verdict is Verdict.DIFFERENT
    assert [finding.name for finding in wrong_offset.findings] == ["offset wrong"]


def test_a_cache_that_cannot_be_cropped_is_not_checked_by_rewinds() -> None:
    probes = {probe.name: probe for probe in compare("llama", "static").rows[1].probes}
    assert probes["rewinds"].note.startswith("not checked")
    assert probes["rows of a batch"].ratio is not None


def test_a_model_that_reads_later_tokens_is_not_comparable() -> None:
    backend = TransformersBackend(tiny_model("bert", is_decoder=False))
    row = compare_ids(backend, PROMPT, steps=8).rows[1]
    assert row.verdict is Verdict.NOT_COMPARABLE


@pytest.mark.parametrize(
    ("name", "cache", "words"),
    [
        ("mistral", "quantized-fp8", "full attention"),
        ("rwkv", "static", "which makes its own"),
        ("xlm", "auto", "stores nothing in a cache"),
    ],
)
def test_what_the_library_refuses_is_unsupported_in_its_words(name: str, cache: str, words: str) -> None:
    row = compare(name, cache).rows[1]
    assert row.verdict is Verdict.UNSUPPORTED
    assert words in row.reason


def test_a_quantized_cache_is_lossy() -> None:
    assert compare("llama", "quantized-fp8").rows[1].verdict is Verdict.LOSSY


def test_positions_are_made_by_the_library() -> None:
    """Reformer takes none, and computes as many positions as it is given."""
    backend, cache = TransformersBackend(tiny_model("reformer")), None
    for length in range(6, 9):
        logits, cache = backend(torch.tensor([PROMPT[:length]]), cache)
    expected = backend(torch.tensor([PROMPT]))[0]
    assert cache is not None and cache.computed == 1
    torch.testing.assert_close(logits[:, -1], expected[:, -1])


def test_caches_are_the_librarys() -> None:
    assert {"auto", "dynamic", "static", "offloaded", "quantized-fp8", "quantized-hqq"} <= cache_names().keys()


def test_a_wider_dtype_is_a_copy_of_the_model() -> None:
    subject = TransformersSubject(TransformersBackend(tiny_model("mixtral").to(torch.bfloat16)))
    wide = subject.in_dtype(torch.float32)
    assert wide is not None and wide.dtype is torch.float32
    widest = wide.in_dtype(torch.float64)
    assert widest is not None
    assert widest(torch.tensor([PROMPT]))[0].dtype is torch.float64
    assert widest.in_dtype(torch.float64) is None
    assert subject(torch.tensor([PROMPT]))[0].dtype is torch.bfloat16


def test_from_the_command_line(tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    options = ("--backend", "transformers", "--model", str(model), "--ids", "--prompt", "5 17 3 40", "-n", "6", "-q")
    result = run("compare", *options, "--cache", "static", "--attention", "eager", "--dtype", "bfloat16", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert (report["backend"], report["dtype"], report["acceptable"]) == ("transformers", "bfloat16", True)


@pytest.mark.slow
def test_values_that_the_library_does_not_know_are_one_line(tmp_path: Path) -> None:
    options = (
        "--backend",
        "transformers",
        "--model",
        str(folder(tmp_path / "model")),
        "--ids",
        "--prompt",
        "5 17 3 40",
    )
    wrong = run("compare", *options, "--cache", "elastic")
    assert wrong.returncode == 2
    assert "--cache 'elastic'" in wrong.stderr and "static" in wrong.stderr
    wrong = run("compare", *options, "--attention", "elastic")
    assert wrong.returncode == 1
    assert len(wrong.stderr.splitlines()) == 1 and "elastic" in wrong.stderr


def test_options_that_the_library_lacks(tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    for options in (EngineOptions(kv_dtype="int8"), EngineOptions(dtype="int3")):
        with pytest.raises(UsageError):
            load_engine("transformers", model, options)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    model = folder(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": names}))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedError, match="transformers refuses it"):
        load_engine("transformers", model, EngineOptions(tokenizer="ids"))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    torch.save(tiny_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="safetensors"):
        load_engine("transformers", tmp_path, EngineOptions(tokenizer="ids"))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "static"])
def test_the_default_model(cache: str) -> None:
    loaded = load_engine("transformers", options=EngineOptions(cache=cache))
    row = compare_ids(loaded.model, loaded.tokenizer.encode("Once upon a time,"), steps=16).rows[1]
    assert row.verdict is Verdict.EQUIVALENT, row.findings


@pytest.mark.slow
@pytest.mark.parametrize("row", ["llama:static:equivalent", "rwkv:static:unsupported", "nemotron_h:static:different"])
def test_the_survey_agrees_with_the_library_alone(row: str) -> None:
    name, cache, verdict = row.split(":")
    found = examine(name, cache)
    assert (found["verdict"], agrees(found)) == (verdict, "yes")
