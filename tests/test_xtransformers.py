"""The x-transformers backend: what `compare` says of it against what the library alone says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

import kvgen
from kvgen import CheckpointError, UnsupportedError, UsageError
from kvgen.backends.xtransformers import XTransformersBackend
from kvgen.comparison.comparison import Comparison, compare_ids
from kvgen.comparison.verdict import Verdict
from kvgen.loading.inspect import inspect
from tests.sizes import first

WRAPPER: dict[str, Any] = {"num_tokens": 64, "max_seq_len": 128, "use_abs_pos_emb": False}
DECODER: dict[str, Any] = {"dim": 64, "depth": 3, "heads": 4, "attn_dim_head": 16, "verbose": False}
ROTARY = {"rotary_pos_emb": True}
LATENT = {"attn_use_latent_kv": True, "attn_dim_latent_kv": 32}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "absolute": ({"use_abs_pos_emb": True}, {}),
    "sinusoidal": ({"use_abs_pos_emb": True, "scaled_sinu_pos_emb": True}, {}),
    "rotary": ({}, ROTARY),
    "absolute and rotary": ({"use_abs_pos_emb": True}, ROTARY),
    "xpos": ({}, {"rotary_xpos": True}),
    "partial rotary": ({}, {**ROTARY, "rotary_emb_dim": 8}),
    "rotary on some heads": ({}, {**ROTARY, "rotate_num_heads": 2}),
    "polar": ({}, {"polar_pos_emb": True}),
    "alibi": ({}, {"alibi_pos_bias": True}),
    "relative bias": ({}, {"rel_pos_bias": True}),
    "dynamic bias": ({}, {"dynamic_pos_bias": True}),
    "no positions": ({}, {}),
    "contextual positions": ({}, {"attn_use_cope": True}),
    "data-dependent alibi": ({}, {"attn_data_dependent_alibi": True}),
    "grouped queries": ({}, {**ROTARY, "attn_kv_heads": 2}),
    "one kv head": ({"use_abs_pos_emb": True}, {"attn_one_kv_head": True}),
    "memory kv": ({}, {**ROTARY, "attn_num_mem_kv": 4}),
    "qk norm": ({}, {**ROTARY, "attn_qk_norm": True}),
    "qk rmsnorm": ({}, {**ROTARY, "attn_qk_rmsnorm": True}),
    "talking heads": ({}, {**ROTARY, "attn_pre_talking_heads": True, "attn_post_talking_heads": True}),
    "sparse top-k": ({}, {**ROTARY, "attn_sparse_topk": 4}),
    "sandwich norm": ({}, {**ROTARY, "sandwich_norm": True}),
    "hyper-connections": ({}, {**ROTARY, "num_residual_streams": 4}),
    "value residual": ({}, {**ROTARY, "add_value_residual": True}),
    "latent attention": ({}, {**ROTARY, **LATENT, "attn_latent_rope_subheads": 2}),
    "latent attention without positions": ({}, LATENT),
    "layer dropout": ({}, {**ROTARY, "layer_dropout": 0.3}),
    "dropout": ({"use_abs_pos_emb": True, "emb_dropout": 0.2}, {"attn_dropout": 0.2, "ff_dropout": 0.2}),
    "shifted tokens": ({}, {**ROTARY, "shift_tokens": 1}),
    "residual attention": ({}, {**ROTARY, "residual_attn": True}),
    "gated residual": ({}, {**ROTARY, "gate_residual": True}),
    "flash": ({}, {**ROTARY, "attn_flash": True}),
    "memory tokens": ({"use_abs_pos_emb": True, "num_memory_tokens": 4}, {}),
    "selective attention": ({"use_abs_pos_emb": True}, {"attn_selective": True}),
    "local attention": ({}, {**ROTARY, "attn_max_attend_past": 8}),
    "learned sinks": ({}, {**ROTARY, "attn_head_learned_sink": True}),
    "post-norm": ({"use_abs_pos_emb": True}, {"pre_norm": False}),
    "integrated layers": ({}, {**ROTARY, "integrate_layers": True}),
    "orthogonal values": ({"use_abs_pos_emb": True}, {"attn_orthog_projected_values": True}),
    "tied embedding": ({"use_abs_pos_emb": True, "tie_embedding": True}, {"weight_tie_layers": True}),
}
PROMPT, STEPS = 10, 16
IDS = torch.randint(0, 64, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
SAME = 1e-3  # wrong logits are off by 0.1 and more here, right ones by 1e-5 and less


def make_net(name: str) -> TransformerWrapper:
    torch.manual_seed(0)
    wrapper, decoder = CONFIGS[name]
    net = TransformerWrapper(**WRAPPER | wrapper, attn_layers=Decoder(**DECODER | decoder))
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return net.eval()


@torch.no_grad()
def truth(net: TransformerWrapper) -> tuple[Verdict, Verdict]:
    """What the library alone says: of the full sequence with the cache, and of the last token with the cache."""
    lengths = range(PROMPT, PROMPT + STEPS)
    uncached = [net(IDS[:, :n])[0, -1] for n in lengths]
    parallel = net(IDS)[0, PROMPT - 1 : -1]
    if (torch.stack(uncached) - parallel).abs().max() > SAME:
        return Verdict.NOT_COMPARABLE, Verdict.NOT_COMPARABLE
    if not net.can_cache_kv:
        return Verdict.UNSUPPORTED, Verdict.UNSUPPORTED
    full, last, full_cache, last_cache = [], [], None, None
    for n in lengths:
        age = {} if full_cache is None else {"cache_age": n - full_cache.cache_length}
        logits, full_cache = net(IDS[:, :n], cache=full_cache, return_intermediates=True, **age)
        full.append(logits[0, -1])
        handed = IDS[:, :n] if last_cache is None else IDS[:, n - 1 : n]
        logits, last_cache = net(handed, cache=last_cache, return_intermediates=True)
        last.append(logits[0, -1])

    def verdict(rows: list[torch.Tensor]) -> Verdict:
        same = (torch.stack(rows) - torch.stack(uncached)).abs().max() < SAME
        return Verdict.EQUIVALENT if same else Verdict.DIFFERENT

    return verdict(full), verdict(last)


def compare_net(net: TransformerWrapper, dtype: torch.dtype = torch.float32) -> Comparison:
    return compare_ids(
        XTransformersBackend(net.to(dtype)),
        IDS[0, :PROMPT].tolist(),
        patterns=["full-sequence", "last-token"],
        continuation=IDS[0, PROMPT:].tolist(),
        steps=STEPS,
    )


@pytest.mark.parametrize("name", first(3, CONFIGS))
def test_the_verdict_agrees_with_the_library_alone(name: str) -> None:
    net = make_net(name)
    expected = truth(net)
    comparison = compare_net(net)
    assert tuple(row.verdict for row in comparison.rows[1:]) == expected
    last_token = comparison.rows[2]
    if last_token.verdict is Verdict.EQUIVALENT:
        assert [finding.name for finding in last_token.findings] == ["harmless here"]
    elif last_token.verdict is Verdict.DIFFERENT and expected[0] is Verdict.EQUIVALENT:
        assert {"offset lost", "order lost"} & {finding.name for finding in last_token.findings}


@pytest.mark.slow
def test_the_configurations_show_every_verdict() -> None:
    seen = {verdict for name in CONFIGS for verdict in truth(make_net(name))}
    assert seen == {Verdict.EQUIVALENT, Verdict.DIFFERENT, Verdict.UNSUPPORTED, Verdict.NOT_COMPARABLE}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary", "absolute", "alibi", "grouped queries", "qk rmsnorm"])
def test_the_verdict_is_the_same_in_bf16(name: str) -> None:
    expected = truth(make_net(name))
    assert tuple(row.verdict for row in compare_net(make_net(name), torch.bfloat16).rows[1:]) == expected


def test_the_diagnosis_tells_what_is_lost() -> None:
    """Rotary keys are cached before they are rotated, so all share a position; an absolute embedding is at 0."""
    for name, finding in (("rotary", "order lost"), ("absolute", "offset lost")):
        assert compare_net(make_net(name)).rows[2].findings[0].name == finding


def test_dropout_that_is_on_is_found() -> None:
    class Training(XTransformersBackend):
        def __init__(self, net: TransformerWrapper) -> None:
            super().__init__(net)
            self.module.train()

    net = make_net("dropout")
    comparison = compare_ids(Training(net), IDS[0, :PROMPT].tolist(), steps=4)
    assert comparison.rows[1].verdict is Verdict.NOT_COMPARABLE
    finding = comparison.rows[0].findings[0]
    assert finding.name == "not deterministic"
    assert "Dropout" in finding.evidence


# --- Folders -----------------------------------------------------------------------------------------------------


def save_folder(folder: Path, net: TransformerWrapper, name: str, **changes: Any) -> Path:
    folder.mkdir()
    wrapper, decoder = CONFIGS[name]
    config = {
        "library": "x-transformers",
        "wrapper": WRAPPER | wrapper | {"num_tokens": 256},
        "decoder": DECODER | decoder,
        "tokenizer": "bytes",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    torch.save(net.state_dict(), folder / "model.pt")
    return folder


def bytes_net(name: str = "rotary") -> TransformerWrapper:
    torch.manual_seed(0)
    wrapper, decoder = CONFIGS[name]
    return TransformerWrapper(
        **WRAPPER | wrapper | {"num_tokens": 256}, attn_layers=Decoder(**DECODER | decoder)
    ).eval()


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "from an AutoregressiveWrapper"])
def test_a_folder_loads_to_the_librarys_logits(tmp_path: Path, wrapped: bool) -> None:
    net = bytes_net()
    folder = save_folder(tmp_path / "x", AutoregressiveWrapper(net) if wrapped else net, "rotary")
    loaded = kvgen.load(folder)
    ids = torch.tensor([loaded.tokenizer.encode("grüße")])
    assert ids.tolist() == [list("grüße".encode())]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids, None)[0], net(ids))


def test_steps_with_a_cache_compute_what_is_new(tmp_path: Path) -> None:
    loaded = kvgen.load(save_folder(tmp_path / "x", bytes_net(), "rotary"))
    chunks = list(kvgen.stream(loaded, "hello", kvgen.Sampling(temperature=0), max_tokens=3))
    assert [chunk.step.computed for chunk in chunks] == [5, 1, 1]


def test_the_context_of_absolute_positions_is_known(tmp_path: Path) -> None:
    loaded = kvgen.load(save_folder(tmp_path / "x", bytes_net("absolute"), "absolute"))
    assert loaded.model.context_length == 128
    with pytest.raises(UsageError, match="room for 128"):
        list(kvgen.stream(loaded, "a" * 128, max_tokens=1))
    assert kvgen.load(save_folder(tmp_path / "y", bytes_net(), "rotary")).model.context_length is None


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"wrappper": {}}, CheckpointError, "'wrappper'"),
        ({"wrapper": 3}, CheckpointError, "wrapper must be an object"),
        ({"decoder": DECODER | {"no_such_option": 1}}, CheckpointError, "no_such_option"),
        ({"wrapper": WRAPPER | {"no_such_option": 1}}, CheckpointError, "no_such_option"),
        ({"decoder": DECODER | {"dim": 32}}, CheckpointError, "different shape|missing|not part"),
        ({"decoder": DECODER | ROTARY | {"cross_attend": True}}, CheckpointError, "missing"),
        ({"tokenizer": "words"}, CheckpointError, "tokenizer is 'words'"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes, kind, message: str) -> None:
    folder = save_folder(tmp_path / "x", bytes_net(), "rotary", **changes)
    with pytest.raises(kind, match=message) as caught:
        kvgen.load(folder)
    assert str(folder) in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code from a checkpoint runs",))


def test_pickles_are_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(tmp_path / "x", bytes_net(), "rotary")
    torch.save({"weight": Evil()}, folder / "model.pt")
    with pytest.raises(CheckpointError, match="cannot be loaded with weights_only=True"):
        kvgen.load(folder)
    assert capsys.readouterr().out == ""


def test_without_the_library_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(tmp_path / "x", bytes_net(), "rotary")
    monkeypatch.setitem(__import__("sys").modules, "x_transformers", None)
    with pytest.raises(UnsupportedError, match=r"kvgen\[x-transformers\]"):
        kvgen.load(folder)


def test_options_of_the_decoder_are_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "x", bytes_net(), "rotary")
    for option in ({"kernels": "cpp"}, {"quantize": "int8"}, {"kv_dtype": "int8"}, {"activations": "int8"}):
        (name, value), *_ = option.items()
        with pytest.raises(UsageError, match=f"in the x-transformers library, for which {name} '{value}' cannot be"):
            kvgen.load(folder, **option)
        with pytest.raises(UsageError, match=f"is a program, for which {name} '{value}' cannot be chosen"):
            kvgen.load("model.py:factory", tokenizer="ids", **option)


def test_inspect_says_what_runs_it(tmp_path: Path) -> None:
    inspection = inspect(save_folder(tmp_path / "x", bytes_net(), "rotary"))
    assert (inspection.backend, inspection.obstacle, inspection.config) == ("x-transformers", "", None)
    assert inspection.parameters == sum(p.numel() for p in bytes_net().state_dict().values())


# --- Conversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ],
    ids=str,
)
def test_a_converted_model_gives_the_same_logits_in_the_library(tiny_llama, tmp_path: Path, config) -> None:
    from kvgen.loading.convert import convert_to_xtransformers

    folder, reference = tiny_llama(rms_norm_eps=1e-12, **config)  # the library's norm has no epsilon of this kind
    loaded = kvgen.load(folder, kernels="off")
    convert_to_xtransformers(loaded.model.module, loaded.tokenizer, tmp_path / "x")
    ids = torch.randint(0, 384, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids).logits
    converted = kvgen.load(tmp_path / "x")
    assert converted.model.name == "x-transformers"
    assert (converted.model(ids, None)[0] - expected).abs().max() < 1e-4
    assert converted.tokenizer.encode("Hello!") == loaded.tokenizer.encode("Hello!")
    assert converted.tokenizer.eos_ids == loaded.tokenizer.eos_ids


def test_what_the_library_lacks_is_not_converted(tiny_llama, tmp_path: Path) -> None:
    from kvgen.loading.convert import convert_to_xtransformers

    loaded = kvgen.load(tiny_llama(attention_bias=True)[0], kernels="off")
    with pytest.raises(UnsupportedError, match=r"attn\.k"):
        convert_to_xtransformers(loaded.model.module, loaded.tokenizer, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_articles_scenario_on_a_real_model(smollm2, smollm2_on_torch, tmp_path: Path) -> None:
    from kvgen.loading.convert import convert_to_xtransformers

    convert_to_xtransformers(smollm2_on_torch.model.module, smollm2.tokenizer, tmp_path / "x")
    loaded = kvgen.load(tmp_path / "x")
    prompt = loaded.tokenizer.encode("Once upon a time,")
    rows = compare_ids(loaded.model, prompt, patterns=["full-sequence", "last-token"], steps=16).rows
    own = kvgen.generate(smollm2, "Once upon a time,", kvgen.Sampling(temperature=0), max_tokens=16)
    texts = [loaded.tokenizer.decode(row.tokens) for row in rows]
    assert texts[0] == texts[1] == own != texts[2]
    assert rows[2].findings[0].name == "order lost"
