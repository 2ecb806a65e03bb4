"""Prompt caches on disk: what is reused is right, and what is damaged or foreign is never used."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kvgen
from kvgen import CacheError, CheckpointError, KvgenError, UsageError
from kvgen.checkpoint import digest
from kvgen.checkpoint.mapped import MappedFile
from kvgen.generation.prompt_cache import describe_prompt_cache, load_prompt_cache, open_prompt_cache, save_prompt_cache
from tests.families import make_checkpoint
from tests.program import run
from tests.sizes import examples


@pytest.fixture(
    scope="module",
    params=[("llama", "cpp"), ("gemma3_text", "cpp"), ("gemma3_text", "off"), ("phi3", "cpp"), ("lfm2", "off")],
)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> kvgen.Loaded:
    """With and without windows, and with rotations that a long text takes other frequencies of."""
    kind, kernels = request.param
    folder = tmp_path_factory.mktemp(kind)
    make_checkpoint(kind, 1 if kind == "phi3" else 0, folder)
    return kvgen.load(folder, tokenizer="ids", kernels=kernels)


def saved(loaded: kvgen.Loaded, ids: torch.Tensor, path: Path) -> Path:
    _, cache = loaded.model(ids, None)
    save_prompt_cache(path, cache, loaded)
    return path


@given(length=st.integers(1, 150), shared=st.integers(0, 150), more=st.integers(0, 40))
@settings(max_examples=examples(25))
def test_any_text_gives_the_logits_of_a_fresh_cache(
    loaded: kvgen.Loaded, tmp_path_factory: pytest.TempPathFactory, length: int, shared: int, more: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.cache"
    text = torch.randint(2, 96, (1, 200))
    saved(loaded, text[:, :length], path)
    other = torch.cat((text[:, :shared], torch.randint(2, 96, (1, more + 1))), dim=1)
    cache = load_prompt_cache(path, loaded)
    assert torch.equal(cache.tokens, text[:, :length])
    fresh, _ = loaded.model(other, None)
    for end in (other.shape[1] - 1, other.shape[1]):
        if end:
            logits, cache = loaded.model(other[:, :end], cache)
    assert (logits - fresh).abs().max() <= (0 if loaded.model.engine.startswith("C++ kernels") else 1e-4)


def test_what_is_shared_is_reused(loaded: kvgen.Loaded, tmp_path: Path) -> None:
    text = torch.randint(2, 96, (1, 40))
    cache = load_prompt_cache(saved(loaded, text, tmp_path / "x.cache"), loaded)
    _, cache = loaded.model(torch.cat((text, text[:, :2]), dim=1), cache)
    assert (cache.reused, cache.computed) == (40, 2)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_narrow_keys_are_kept_as_they_are(tiny_llama, tmp_path: Path, kv_dtype: str) -> None:
    folder, _ = tiny_llama()
    loaded = kvgen.load(folder, kv_dtype=kv_dtype)
    ids = torch.randint(2, 300, (1, 70))
    cache = load_prompt_cache(saved(loaded, ids[:, :60], tmp_path / "x.cache"), loaded)
    assert torch.equal(loaded.model(ids, cache)[0], loaded.model(ids, None)[0])
    assert describe_prompt_cache(tmp_path / "x.cache").dtype == kv_dtype


def test_caches_of_other_weights_or_arithmetic_are_refused(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    loaded = kvgen.load(folder)
    path = saved(loaded, torch.randint(2, 300, (1, 20)), tmp_path / "x.cache")
    others = [
        kvgen.load(tiny_llama(seed=1, name="other")[0]),
        kvgen.load(folder, kernels="off"),
        kvgen.load(folder, quantize="int8"),
        kvgen.load(folder, kv_dtype="bfloat16"),
        kvgen.load(folder, dtype="bfloat16"),
    ]
    for other in others:
        with pytest.raises(CacheError, match=r"x\.cache: a prompt cache of .*name another file"):
            load_prompt_cache(path, other)
    assert load_prompt_cache(path, kvgen.load(folder)).length == 20


def test_a_model_of_the_x_transformers_library_has_none(x_rotary: Path, tmp_path: Path) -> None:
    loaded = kvgen.load(x_rotary)
    for use in (load_prompt_cache, lambda path, loaded: saved(loaded, torch.randint(2, 256, (1, 20)), path)):
        with pytest.raises(UsageError, match="a prompt cache needs kvgen's own decoder"):
            use(tmp_path / "x.cache", loaded)
    assert not list(tmp_path.glob("x.cache*"))


def test_one_changed_byte_anywhere_is_other_weights(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kvgen.checkpoint.digest._SETTLED", 0)
    folder, _ = tiny_llama(hidden_size=256, intermediate_size=512)
    path = saved(kvgen.load(folder), torch.randint(2, 300, (1, 20)), tmp_path / "x.cache")
    weights = folder / "model.safetensors"
    content, changed = weights.read_bytes(), random.Random(0).sample(range(10000, weights.stat().st_size), 3)
    for place in changed:
        weights.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CacheError, match="name another file"):
            load_prompt_cache(path, kvgen.load(folder))
    weights.write_bytes(content)
    assert load_prompt_cache(path, kvgen.load(folder)).length == 20


def test_a_digest_is_remembered_until_the_file_changes(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVGEN_CACHE_DIR", str(tmp_path / "kvgen"))
    monkeypatch.setattr(digest, "_SETTLED", 0)
    read: list[str] = []
    whole = digest._compute_digest
    monkeypatch.setattr(digest, "_compute_digest", lambda file: read.append(file.path.name) or whole(file))
    folder, _ = tiny_llama()
    loaded = kvgen.load(folder)
    first = digest.digest_of(loaded.files)
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert digest.digest_of(kvgen.load(folder).files) == first
    assert len(read) == 2
    for note in (tmp_path / "kvgen" / "digests").iterdir():
        note.write_text("damaged")
    assert digest.digest_of(loaded.files) == first
    assert len(read) == 4
    (folder / "model.safetensors").write_bytes(bytes(10))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has changed since it was read"):
        digest.digest_of(loaded.files)


def rewritten(path: Path, change: Any) -> None:
    """Change tensors or metadata; the digest stays what it was unless that is what is changed."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


DAMAGE = {
    "a number changed": lambda tensors, metadata: tensors["keys.0"].view(-1)[3].add_(1),
    "a token changed": lambda tensors, metadata: tensors["tokens"][0, 2].add_(1),
    "a layer is missing": lambda tensors, metadata: tensors.pop("values.1"),
    "no tokens": lambda tensors, metadata: tensors.pop("tokens"),
    "no identity": lambda tensors, metadata: metadata.pop("identity"),
    "of a later version": lambda tensors, metadata: metadata.update({"kvgen-prompt-cache": "3"}),
    "no prompt cache": lambda tensors, metadata: metadata.clear(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed(tiny_llama, tmp_path: Path, name: str) -> None:
    loaded = kvgen.load(tiny_llama()[0])
    path = saved(loaded, torch.randint(2, 300, (1, 20)), tmp_path / "x.cache")
    rewritten(path, DAMAGE[name])
    for read in (lambda: load_prompt_cache(path, loaded), lambda: describe_prompt_cache(path)):
        with pytest.raises(CacheError, match=r"x\.cache: "):
            read()


def test_a_file_that_is_replaced_while_it_is_opened_is_one_or_the_other(
    tiny_llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = kvgen.load(tiny_llama()[0])
    path = saved(loaded, torch.randint(2, 300, (1, 20)), tmp_path / "x.cache")
    ids = torch.randint(2, 300, (1, 30))
    other = saved(loaded, ids, tmp_path / "other.cache")

    def replaced(file: Path) -> MappedFile:
        if other.exists():  # as by another process that saves its cache
            other.replace(path)
        return MappedFile(file)

    monkeypatch.setattr("kvgen.checkpoint.hf.MappedFile", replaced)
    assert load_prompt_cache(path, loaded).tokens.equal(ids)


def test_digests_that_are_damaged_are_computed_again(tiny_llama, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "_SETTLED", 0)
    loaded = kvgen.load(tiny_llama()[0])
    path = saved(loaded, torch.randint(2, 300, (1, 20)), tmp_path / "x.cache")
    for content in (b"", b"\xff", b"[]", b"3", b"[" * 100_000):
        for entry in (tmp_path / "cache" / "digests").iterdir():
            entry.write_bytes(content)
        load_prompt_cache(path, loaded)


FORGERIES = {
    "shorter layer": lambda tensors, metadata: tensors.update({"keys.1": tensors["keys.1"][:, :, :5]}),
    "all layers shorter": lambda tensors, metadata: tensors.update(
        {name: tensor[:, :, :5] for name, tensor in tensors.items() if name != "tokens"}
    ),
    "the first positions are missing": lambda tensors, metadata: tensors.update(
        {name: tensors[name][:, :, 5:] for name in ("keys.1", "values.1")}
    ),
    "more values than keys": lambda tensors, metadata: tensors.update({"keys.1": tensors["keys.1"][:, :, :5]}),
    "a state instead": lambda tensors, metadata: tensors.update({"state.20.0.1": tensors.pop("keys.1")}),
    "a state besides": lambda tensors, metadata: tensors.update({"state.20.0.1": torch.zeros(3)}),
    "another head size": lambda tensors, metadata: tensors.update({"keys.0": tensors["keys.0"][..., :4]}),
    "another dtype": lambda tensors, metadata: tensors.update({"keys.0": tensors["keys.0"].half()}),
    "fewer layers": lambda tensors, metadata: [tensors.pop(name) for name in ("keys.2", "values.2")],
    "more layers": lambda tensors, metadata: tensors.update({"keys.3": tensors["keys.0"].clone()}),
    "a layer without a number": lambda tensors, metadata: tensors.update({"keys": tensors.pop("keys.1")}),
    "tokens of another vocabulary": lambda tensors, metadata: tensors["tokens"][0, 0].fill_(10**9),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_files_that_do_not_add_up_are_refused(
    tiny_llama, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where someone made the digest fit."""
    loaded = kvgen.load(tiny_llama()[0])
    path = saved(loaded, torch.randint(2, 300, (1, 20)), tmp_path / "x.cache")
    rewritten(path, FORGERIES[name])
    with safe_open(path, framework="pt") as file:
        known = file.metadata()["sha256"]
    monkeypatch.setattr("kvgen.generation.prompt_cache.digest", lambda tensors: known)
    with pytest.raises(CacheError, match=r"x\.cache: .* damaged"):
        load_prompt_cache(path, loaded)


@given(st.binary(max_size=300))
@settings(max_examples=examples(50))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.cache"
    path.write_bytes(content)
    with pytest.raises(CacheError):
        describe_prompt_cache(path)


def test_a_model_of_another_backend_has_none(tiny_llama, tmp_path: Path) -> None:
    from kvgen.comparison.verified import VerifiedBackend

    loaded = kvgen.load(tiny_llama()[0])
    path = saved(loaded, torch.randint(2, 300, (1, 20)), tmp_path / "x.cache")
    other = replace(loaded, model=VerifiedBackend(loaded.model, 1))
    for file in (path, tmp_path / "new.cache"):  # at once, not when the text is there
        with pytest.raises(UsageError, match="kvgen's own decoder"):
            open_prompt_cache(file, other)


def test_a_file_that_cannot_be_written_leaves_nothing(tiny_llama, tmp_path: Path) -> None:
    loaded = kvgen.load(tiny_llama()[0])
    _, cache = loaded.model(torch.randint(2, 300, (1, 20)), None)
    (tmp_path / "taken").mkdir()
    with pytest.raises(KvgenError, match="cannot be written"):
        save_prompt_cache(tmp_path / "taken", cache, loaded)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_on_the_command_line(tiny_llama, tmp_path: Path) -> None:
    folder, _ = tiny_llama()
    path = tmp_path / "x.cache"
    arguments = ("generate", "-m", str(folder), "-p", "The quick brown fox", "-t", "0", "-n", "8")
    plain = run(*arguments)
    first, second = run(*arguments, "--prompt-cache", str(path)), run(*arguments, "--prompt-cache", str(path))
    assert plain.stdout == first.stdout == second.stdout
    count = describe_prompt_cache(path)
    prompt = len(count.tokens) - 7
    assert f"prompt cache: 0 of {prompt} positions reused" in first.stderr
    assert f"prompt cache: {prompt - 1} of {prompt} positions reused" in second.stderr
    assert run(*arguments, "--prompt-cache", str(path), "-q").stderr == ""
    data = json.loads(run("cache", "inspect", str(path), "--json").stdout)
    assert (data["layers"], data["dtype"], len(data["tokens"])) == (3, "float32", prompt + 7)
    shown = run("cache", "inspect", str(path)).stdout
    assert str(folder) in shown
    assert "cache float32, weights as stored" in shown
    path.write_bytes(path.read_bytes()[:-40])
    for command in ((*arguments, "--prompt-cache", str(path)), ("cache", "inspect", str(path))):
        refused = run(*command)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.count("\n") == 1
    assert run(*arguments, "--prompt-cache", str(tmp_path / "no" / "x")).returncode == 2
    assert run(*arguments, "--prompt-cache", str(path), "--no-cache").returncode == 2
