"""LoRA adapters: the logits of PEFT, on models of any layout; what does not fit is refused, caches are kept apart."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import kvgen
from kvgen import CacheError, CheckpointError, KvgenError, NotFoundError, UnsupportedError, UsageError
from kvgen.backends.adapter import read_adapter
from kvgen.generation.prompt_cache import load_prompt_cache, save_prompt_cache
from kvgen.loading.inspect import inspect
from kvgen.pipeline.record import Record, describe_model, differences, run_record
from kvgen.tokenizer.prompt import PromptFormat
from tests import gguf_files, program
from tests.families import CONFIGS, ONE_KV_HEAD, make_model
from tests.quantized_files import Form, make_quantized
from tests.test_families import TOLERANCE, random_ids
from tests.test_multimodal import make_gemma3

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TIED = ONE_KV_HEAD | {"tie_word_embeddings": True}
GPT2 = CONFIGS["gpt2"][0]

# model type, its config, the adapter's config
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all linear": ("llama", {}, {"target_modules": "all-linear", "lora_alpha": 16}),
    "patterns": (
        "llama",
        TIED,
        {"target_modules": [*ATTENTION, *MLP], "use_rslora": True, "lora_alpha": 3, "layers_to_transform": [0, 2]}
        | {"rank_pattern": {"k_proj": 1, r"^model.layers.2.self_attn.q_proj": 7}}
        | {"alpha_pattern": {"(up|down)_proj": 11, r"layers\.\d+\.self_attn\.k_proj": 5}},
    ),
    "embedding": ("llama", {}, {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding, tied": ("llama", TIED, {"target_modules": ["embed_tokens", "v_proj"]}),
    "head, tied": ("llama", TIED, {"target_modules": ["lm_head"]}),
    "saved embedding": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved embedding, tied": ("qwen2", TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved norms": (
        "gemma3_text",
        CONFIGS["gemma3_text"][0],
        {"target_modules": ATTENTION, "modules_to_save": ["norm", "post_attention_layernorm", "q_norm"]},
    ),
    "all biases": ("qwen2", {}, {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "their biases": ("qwen2", {}, {"target_modules": ["q_proj", "o_proj", "v_proj"], "bias": "lora_only"}),
    "DoRA": ("llama", {}, {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "DoRA of embeddings": ("llama", TIED, {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
    "transposed": ("gpt2", GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "transposed DoRA": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False},
        {"target_modules": ["c_attn", "c_proj", "wte"], "use_dora": True},
    ),
    "transposed, biases": ("gpt2", GPT2, {"target_modules": ["c_attn"], "bias": "all"}),
    "by heads": ("gpt_neox", {"rotary_pct": 0.25}, {"target_modules": ["query_key_value", "dense"], "use_dora": True}),
    "fused": ("phi3", {"sliding_window": 9}, {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    "interleaved": ("cohere", {"logit_scale": 0.3}, {"target_modules": ATTENTION}),
    "beside experts": ("qwen3_moe", CONFIGS["qwen3_moe"][0], {"target_modules": ATTENTION}),
    "convolutions": ("lfm2", CONFIGS["lfm2"][0], {"target_modules": ["in_proj", "out_proj", "w1", "w2", "w3"]}),
    "state spaces": ("mamba2", CONFIGS["mamba2"][0], {"target_modules": ["in_proj"]}),
}
GGUF_CASES = [
    *(
        "all linear",
        "patterns",
        "embedding, tied",
        "head, tied",
        "saved embedding",
        "saved norms",
        "all biases",
        "DoRA",
    ),
    *("transposed DoRA", "by heads", "fused", "interleaved"),
]


def train(model: Any, folder: Path, seed: int = 5, **config: Any) -> None:
    """Write an adapter of a model, all of whose numbers are random, into `folder`."""
    adapted = get_peft_model(deepcopy(model), LoraConfig(**{"r": 3, "lora_alpha": 5} | config))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)


def expected_logits(model: Any, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    adapted = PeftModel.from_pretrained(deepcopy(model), folder).eval()
    with torch.inference_mode():
        return adapted(input_ids=ids, use_cache=False).logits


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path]:
    """A small model, and an adapter of it."""
    model = make_model("llama", {})
    model.save_pretrained(tmp_path / "model")
    train(model, tmp_path / "adapter", target_modules=ATTENTION)
    return tmp_path / "model", tmp_path / "adapter"


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_peft(name: str, kernels: str, tmp_path: Path) -> None:
    kind, options, config = CASES[name]
    model = make_model(kind, options)
    model.save_pretrained(tmp_path / "model")
    train(model, tmp_path / "adapter", **config)
    loaded = kvgen.load(tmp_path / "model", tokenizer="ids", adapter=tmp_path / "adapter", kernels=kernels).model
    ids = random_ids()
    expected = expected_logits(model, tmp_path / "adapter", ids)
    assert (loaded.all_logits(ids) - expected).abs().max() < TOLERANCE
    without = kvgen.load(tmp_path / "model", tokenizer="ids", kernels=kernels).model
    assert (without.all_logits(ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", GGUF_CASES)
def test_an_adapter_changes_a_gguf_file_alike(name: str, tmp_path: Path) -> None:
    kind, options, config = CASES[name]
    if kind == "gemma3_text":
        options = options | {"query_pre_attn_scalar": 12, "num_hidden_layers": 7, "layer_types": None}
    model = make_model(kind, options)
    gguf_files.write_gguf(tmp_path / "model.gguf", kind, model)
    train(model, tmp_path / "adapter", **config)
    loaded = kvgen.load(tmp_path / "model.gguf", tokenizer="ids", adapter=tmp_path / "adapter").model
    ids = random_ids()
    assert (loaded.all_logits(ids) - expected_logits(model, tmp_path / "adapter", ids)).abs().max() < TOLERANCE


def test_quantized_weights_are_dequantized_where_the_adapter_changes_them(tmp_path: Path) -> None:
    model = make_model("llama", {})
    kind = gguf.GGMLQuantizationType.Q8_0
    gguf_files.write_gguf(tmp_path / "model.gguf", "llama", model, type_=kind)
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[1] % 32 == 0:
            packed = gguf.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(gguf.dequantize(packed, kind).copy())
    train(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    ids = random_ids()
    expected = expected_logits(model, tmp_path / "adapter", ids)
    for kernels in ("auto", "off"):
        path, adapter = tmp_path / "model.gguf", tmp_path / "adapter"
        loaded = kvgen.load(path, tokenizer="ids", adapter=adapter, kernels=kernels).model
        assert (loaded.all_logits(ids) - expected).abs().max() < (1e-2 if kernels == "auto" else TOLERANCE)
    sizes = {name: weight.nbytes for name, weight in kvgen.load(path, tokenizer="ids").model.decoder.weights.items()}
    changed = kvgen.load(path, tokenizer="ids", adapter=adapter).model.decoder.weights
    assert {name for name in sizes if changed[name].nbytes != sizes[name]} == {
        f"blk.{layer}.attn.q.weight" for layer in range(3)
    }  # ffn.down is not quantized, since its rows are not whole groups


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantized_folders_are_changed_alike(method: str, tmp_path: Path) -> None:
    model = make_quantized(tmp_path / "model", Form(method))
    train(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    ids = random_ids()
    loaded = kvgen.load(tmp_path / "model", tokenizer="ids", adapter=tmp_path / "adapter", kernels="off").model
    assert (loaded.all_logits(ids) - expected_logits(model, tmp_path / "adapter", ids)).abs().max() < TOLERANCE


def test_an_adapter_of_a_model_with_images_fits_its_text_part(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = make_gemma3().eval()
    model.save_pretrained(tmp_path / "model")
    train(model, tmp_path / "adapter", target_modules=r".*language_model.*\.(q_proj|down_proj)")
    loaded = kvgen.load(tmp_path / "model", tokenizer="ids", adapter=tmp_path / "adapter").model
    ids = random_ids(length=40)
    assert (loaded.all_logits(ids) - expected_logits(model, tmp_path / "adapter", ids)).abs().max() < TOLERANCE


def test_experts_that_are_stored_alone_may_be_changed_alone(tmp_path: Path) -> None:
    """As in adapters from before transformers held all experts of a layer in one tensor."""
    model = make_model("qwen3_moe", CONFIGS["qwen3_moe"][0])
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    tensors, weights = {}, load_file(tmp_path / "model" / "model.safetensors")
    for expert in range(6):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj"
        a, b = torch.randn(2, 32), torch.randn(20, 2)
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        weights[f"{name}.weight"] += 2 * b @ a
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    ids = random_ids()
    actual = kvgen.load(tmp_path / "model", tokenizer="ids", adapter=tmp_path / "adapter").model.all_logits(ids)
    save_file(weights, tmp_path / "model" / "model.safetensors")
    expected = kvgen.load(tmp_path / "model", tokenizer="ids").model.all_logits(ids)
    assert (actual - expected).abs().max() < TOLERANCE


def test_narrow_numbers_are_added_in_float32(tmp_path: Path) -> None:
    model = make_model("llama", {})
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    deepcopy(model).bfloat16().save_pretrained(tmp_path / "model")
    train(model, tmp_path / "adapter", target_modules=ATTENTION)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    ids = random_ids()
    expected = expected_logits(model, tmp_path / "adapter", ids)
    for kernels in ("auto", "off"):
        loaded = kvgen.load(tmp_path / "model", tokenizer="ids", adapter=tmp_path / "adapter", kernels=kernels).model
        assert (loaded.all_logits(ids) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_the_sum_is_rounded_like_other_weights(adapted: tuple[Path, Path], options: dict[str, str]) -> None:
    model, adapter = adapted
    whole = kvgen.load(model, tokenizer="ids", adapter=adapter).model
    rounded = kvgen.load(model, tokenizer="ids", adapter=adapter, **options).model
    ids = random_ids()
    assert 0 < (whole.all_logits(ids) - rounded.all_logits(ids)).abs().max() < 0.5
    assert rounded.weight_bytes < whole.weight_bytes / 1.9


def test_prompt_caches_of_other_adapters_are_refused(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, first = adapted
    second = tmp_path / "second"
    train(make_model("llama", {}), second, seed=6, target_modules=ATTENTION)
    loaded = [kvgen.load(folder, tokenizer="ids", adapter=adapter) for adapter in (None, first, second)]
    ids = random_ids(1, 20)
    for number, owner in enumerate(loaded):
        path = tmp_path / f"{number}.cache"
        save_prompt_cache(path, owner.model(ids, None)[1], owner)
        for other in loaded:
            if other is owner:
                assert load_prompt_cache(path, other).length == 20
            else:
                with pytest.raises(CacheError, match="name another file"):
                    load_prompt_cache(path, other)
    with pytest.raises(CacheError, match=re.escape(f"of {folder} with {first} (")):
        load_prompt_cache(tmp_path / "1.cache", loaded[0])


@pytest.mark.parametrize(
    ("options", "shape"), [({"hidden_size": 30, "num_attention_heads": 3}, (10, 30)), ({"head_dim": 12}, (12, 32))]
)
def test_an_adapter_of_another_model_is_refused_by_its_tensor(
    adapted: tuple[Path, Path], options: dict[str, Any], shape: tuple[int, int], tmp_path: Path
) -> None:
    other = make_model("llama", ONE_KV_HEAD | options)
    other.save_pretrained(tmp_path / "other")
    gguf_files.write_gguf(tmp_path / "other.gguf", "llama", other)
    for path in (tmp_path / "other", tmp_path / "other.gguf"):
        name = "model.layers.0.self_attn.k_proj.weight"
        message = f"{adapted[1]}: changes {name!r} as if its shape were (16, 32), but in {path} it is {shape}"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            kvgen.load(path, tokenizer="ids", adapter=adapted[1])


def test_an_adapter_of_another_family_is_refused_by_its_tensor(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    make_model("gpt2", GPT2).save_pretrained(tmp_path / "gpt2")
    message = r"changes 'model\.layers\.0\.self_attn\.k_proj\.weight', which .*gpt2 does not have"
    with pytest.raises(CheckpointError, match=message):
        kvgen.load(tmp_path / "gpt2", tokenizer="ids", adapter=adapted[1])
    make_model("llama", {"num_hidden_layers": 2}).save_pretrained(tmp_path / "shorter")
    with pytest.raises(CheckpointError, match=r"changes 'model\.layers\.2\..*', which .*shorter does not have"):
        kvgen.load(tmp_path / "shorter", tokenizer="ids", adapter=adapted[1])


CONFIG_CHANGES: list[tuple[dict[str, Any], type[KvgenError], str]] = [
    ({"peft_type": "IA3"}, UnsupportedError, "peft_type is 'IA3'"),
    ({"peft_type": None}, CheckpointError, "peft_type is missing"),
    ({"lora_bias": True}, UnsupportedError, "lora_bias is True"),
    ({"target_parameters": ["experts.gate_up_proj"]}, UnsupportedError, "target_parameters is"),
    ({"trainable_token_indices": [1]}, UnsupportedError, "trainable_token_indices is"),
    ({"layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication is"),
    ({"never_heard_of": 3}, UnsupportedError, "never_heard_of is 3"),
    ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights is 'pissa', which changes the model too"),
    ({"r": 4}, CheckpointError, r"lora_A of shape \(3, 32\) and lora_B of shape \(\d+, 3\), but the rank 4"),
    ({"r": 0}, CheckpointError, "r is 0"),
    ({"lora_alpha": "x"}, CheckpointError, "lora_alpha is 'x'"),
    ({"use_dora": True}, CheckpointError, "has no lora_magnitude_vector"),
    ({"alpha_pattern": {"(a+)+": 1}}, UnsupportedError, "too complex"),
    ({"alpha_pattern": {".*.*.*": 1}}, UnsupportedError, "too complex"),
    ({"alpha_pattern": {"(": 1}}, CheckpointError, "alpha_pattern has the expression"),
    ({"rank_pattern": {"q_proj": -1}}, CheckpointError, "rank_pattern is -1"),
    ({"rank_pattern": 3}, CheckpointError, "rank_pattern is 3"),
]


@pytest.mark.parametrize(("change", "error", "message"), CONFIG_CHANGES, ids=str)
def test_other_kinds_of_adapters_are_refused_by_name(
    adapted: tuple[Path, Path], change: dict[str, Any], error: type[KvgenError], message: str
) -> None:
    model, adapter = adapted
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        kvgen.load(model, tokenizer="ids", adapter=adapter)


PREFIX = "base_model.model.model.layers.0.self_attn"
TENSOR_CHANGES: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({f"{PREFIX}.q_proj.lora_B.weight": None}, "self_attn.q_proj has no lora_B"),
    ({f"{PREFIX}.q_proj.lora_embedding_A": torch.ones(3, 32)}, "self_attn.q_proj has no lora_embedding_B"),
    ({f"{PREFIX}.q_proj.lora_magnitude_vector": torch.ones(32)}, "self_attn.q_proj has more than"),
    ({f"{PREFIX}.q_proj.lora_A.weight": torch.ones(3, 32, 1)}, "self_attn.q_proj is a convolution"),
    ({f"{PREFIX}.q_proj.lora_A.weight": torch.ones(3, 32, dtype=torch.int64)}, "has the type I64"),
    ({f"{PREFIX}.q_proj.lora_C.weight": torch.ones(3)}, "is not of a LoRA adapter"),
    ({"model.layers.0.self_attn.q_proj.weight": torch.ones(3)}, "is not of a LoRA adapter"),
    ({f"{PREFIX}.q_proj.weight": torch.ones(3)}, r"as if its shape were \(3,\), but in .* it is \(32, 32\)"),
    ({f"{PREFIX}.r_proj.weight": torch.ones(3)}, "does not have"),
    ({f"base_model.model.{'x.' * 200}weight": torch.ones(3)}, "is not of a LoRA adapter"),
    ({f"{PREFIX}.q_proj.bias": torch.ones(32)}, "does not have"),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_CHANGES, ids=str)
def test_tensors_that_do_not_fit_are_refused(
    adapted: tuple[Path, Path], change: dict[str, torch.Tensor | None], message: str
) -> None:
    model, adapter = adapted
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(KvgenError, match=message):
        kvgen.load(model, tokenizer="ids", adapter=adapter)


def test_what_is_no_adapter_is_refused(adapted: tuple[Path, Path], x_rotary: Path, tmp_path: Path) -> None:
    model, adapter = adapted
    with pytest.raises(NotFoundError, match="no such folder"):
        kvgen.load(model, tokenizer="ids", adapter=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        kvgen.load(model, tokenizer="ids", adapter=model)
    with pytest.raises(UsageError, match="in the x-transformers library, which takes no adapter"):
        kvgen.load(x_rotary, adapter=adapter)
    with pytest.raises(UsageError, match="is a program, which takes no adapter"):
        kvgen.load("model.py:make", adapter=adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="has no adapter_model.safetensors"):
        kvgen.load(model, tokenizer="ids", adapter=adapter)


def test_a_run_is_resumed_with_the_same_adapter_only(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = adapted

    def record(adapter: Path | None) -> Record:
        arguments = {"reference": folder, "tokenizer": "ids", "adapter": adapter}
        model = describe_model(arguments, kvgen.load(**arguments))
        return run_record(model, kvgen.Request(()), PromptFormat(), None, **bounds)

    bounds = {"max_tokens_bounds_rows": False}
    first = record(adapter)
    assert "weights is" in differences(record(None), first)
    moved = adapter.rename(tmp_path / "moved")
    assert differences(record(moved), first) == ""


def test_commands_take_an_adapter(tiny_llama: Any, tmp_path: Path) -> None:
    folder, model = tiny_llama()
    adapter = tmp_path / "adapter"
    train(model, adapter, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    arguments = ("generate", "-m", str(folder), "-p", "a b", "-t", "0", "-n", "12")
    texts = [program.run(*arguments, *more).stdout for more in ((), ("--adapter", str(adapter)))]
    expected = kvgen.load(folder, adapter=adapter)
    assert texts[1] == kvgen.generate(expected, "a b", kvgen.Sampling(temperature=0), max_tokens=12) + "\n" != texts[0]
    shown = program.run("inspect", str(folder), "--adapter", str(adapter)).stdout
    assert "LoRA of rank 3, alpha 5; 6 weights: q_proj, v_proj; 1 whole tensors; " in shown
    data = json.loads(program.run("inspect", str(folder), "--adapter", str(adapter), "--json").stdout)["adapter"]
    assert (data["rank"], data["alpha"], data["targets"], data["weights"]) == (3, 5, ["q_proj", "v_proj"], 6)
    assert inspect(folder).adapter is None
    assert read_adapter(adapter).nbytes == data["bytes"] > 0
    converted = program.run(
        "convert", str(folder), str(tmp_path / "x"), "--to", "x-transformers", "--adapter", str(adapter)
    )
    assert converted.returncode == 0, converted.stderr
    ids = random_ids()
    theirs, ours = kvgen.load(tmp_path / "x").model(ids, None)[0], expected.model(ids, None)[0]
    assert (theirs[:, -1] - ours[:, -1]).abs().max() < 1e-2  # the library's norms have no epsilon
    result = program.run("generate", "-m", str(folder), "--adapter", str(folder), "-p", "a")
    assert result.returncode == 1 and "has no adapter_config.json" in result.stderr
