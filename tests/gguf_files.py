"""GGUF files of every family that llama.cpp has, written from transformers' models as its converter writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH

from kvgen.checkpoint.strings import Strings
from tests import (
    gguf_delta_nets,
    gguf_experts,
    gguf_gpt_oss,
    gguf_hybrids,
    gguf_jamba,
    gguf_latent,
    gguf_recurrent,
    gguf_shared_keys,
)
from tests.families import (
    BOTH_KINDS,
    GPT2_SIZES,
    GRANITE_SCALES,
    LINEAR,
    LLAMA3,
    NTK_ALPHA,
    OLMO3_YARN,
    ONE_KV_HEAD,
    THREE_HEADS,
    YARN,
    growing,
    longrope,
)

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "gpt2": MODEL_ARCH.GPT2,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
    "phi": MODEL_ARCH.PHI2,
    "phi3": MODEL_ARCH.PHI3,
    "olmo2": MODEL_ARCH.OLMO2,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "granite": MODEL_ARCH.GRANITE,
    "starcoder2": MODEL_ARCH.STARCODER2,
    "stablelm": MODEL_ARCH.STABLELM,
    "arcee": MODEL_ARCH.ARCEE,
    "seed_oss": MODEL_ARCH.SEED_OSS,
    "nemotron": MODEL_ARCH.NEMOTRON,
    "ernie4_5": MODEL_ARCH.ERNIE4_5,
    "cohere": MODEL_ARCH.COMMAND_R,
    "cohere2": MODEL_ARCH.COHERE2,
    "glm4": MODEL_ARCH.GLM4,
    "olmo3": MODEL_ARCH.OLMO2,
    "exaone4": MODEL_ARCH.EXAONE4,
    "hunyuan_v1_dense": MODEL_ARCH.HUNYUAN_DENSE,
    "apertus": MODEL_ARCH.APERTUS,
    "ministral3": MODEL_ARCH.MISTRAL3,
    "lfm2": MODEL_ARCH.LFM2,
    "mamba2": MODEL_ARCH.MAMBA2,
}
_RAMP = {"beta_fast": 1.0, "beta_slow": 0.05, "attention_factor": 0.1 * math.log(YARN["rope_parameters"]["factor"]) + 1}
# What a GGUF file cannot say is fixed in llama.cpp: which layers slide or do not rotate, and some scales.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", LLAMA3 | {"head_dim": 16}),
    ("llama", YARN | ONE_KV_HEAD | {"attention_bias": True, "tie_word_embeddings": True}),
    ("mistral", THREE_HEADS | {"sliding_window": None}),
    ("qwen2", LINEAR),
    ("qwen2", YARN | ONE_KV_HEAD | {"tie_word_embeddings": True}),
    ("qwen2", {"rope_parameters": YARN["rope_parameters"] | _RAMP}),
    ("qwen3", {"head_dim": 12}),
    ("gemma", {"head_dim": 12}),
    ("gemma2", {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 9, "num_hidden_layers": 4}),
    ("gemma3_text", {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 9, "num_hidden_layers": 7}),
    ("gpt2", GPT2_SIZES),
    ("gpt2", GPT2_SIZES | {"tie_word_embeddings": False}),
    ("gpt_neox", {"rotary_pct": 0.25}),
    ("gpt_neox", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    ("phi", {"partial_rotary_factor": 0.5}),
    ("phi3", {"sliding_window": 9}),
    ("phi3", longrope(4)),
    ("olmo2", ONE_KV_HEAD),
    ("smollm3", {"num_hidden_layers": 5}),
    ("granite", GRANITE_SCALES),
    ("starcoder2", {"sliding_window": None}),
    ("stablelm", {"partial_rotary_factor": 0.25}),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}),
    ("arcee", LLAMA3 | ONE_KV_HEAD | {"head_dim": 12}),
    ("seed_oss", THREE_HEADS | {"head_dim": 12, "tie_word_embeddings": True}),
    ("nemotron", ONE_KV_HEAD | LINEAR),
    ("nemotron", {"mlp_bias": True}),
    ("ernie4_5", {"head_dim": 12}),
    ("cohere", {"logit_scale": 0.3}),
    ("cohere", ONE_KV_HEAD | {"use_qk_norm": True, "logit_scale": 2.0}),
    ("cohere2", {"sliding_window": 9, "num_hidden_layers": 5, "logit_scale": 0.3}),
    ("glm4", {"head_dim": 12}),
    ("olmo3", OLMO3_YARN | {"sliding_window": 9, "num_hidden_layers": 5}),
    ("olmo3", ONE_KV_HEAD | {"sliding_window": 4, "layer_types": BOTH_KINDS}),
    ("exaone4", {"sliding_window": 9, "layer_types": BOTH_KINDS}),
    ("exaone4", LLAMA3 | {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    ("hunyuan_v1_dense", {"head_dim": 12} | NTK_ALPHA),
    ("apertus", LLAMA3),
    ("ministral3", {"head_dim": 12} | growing(mscale=1.0, mscale_all_dim=1.0)),
    ("ministral3", ONE_KV_HEAD | {"head_dim": 6} | growing(mscale=1.0, mscale_all_dim=0.5)),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    (
        "lfm2",
        ONE_KV_HEAD
        | {
            "layer_types": ["full_attention", "conv"] * 2,
            "num_hidden_layers": 4,
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    ("mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 12}),
    ("mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 7, "conv_kernel": 3, "use_bias": True}),
]


for _module in (gguf_experts, gguf_gpt_oss, gguf_latent, gguf_delta_nets, gguf_hybrids, gguf_jamba, gguf_shared_keys):
    ARCHITECTURES |= _module.ARCHITECTURES
    CONFIGS += _module.CONFIGS
_CONVOLUTIONS = ("lfm2", "lfm2_moe")


def write_gguf(
    path: Path,
    kind: str,
    reference: Any,
    *,
    tokenizer: Any = None,
    keys: Mapping[str, str | int] = MappingProxyType({}),
    type_: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    quantized: Callable[[str], bool] = lambda name: True,
) -> None:
    """Write a model.

    tokenizer: a BPE of the library tokenizers; None for a vocabulary of as many made-up tokens as the model has.
    keys: further ones of its architecture.
    type_: of the matrices that llama.cpp quantizes, if their names are `quantized` and their rows whole blocks.
    """
    arch = gguf_hybrids.architecture(reference.config) or ARCHITECTURES[kind]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    config = reference.config
    _write_sizes(writer, config)
    _write_rope(writer, config)
    _write_mechanisms(writer, kind, config)
    if kind == "apertus":
        _write_slopes(writer, reference)
    for name, value in keys.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{writer.arch}.{name}", value)
    _write_vocabulary(writer, config.vocab_size, tokenizer)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = (part for tensor in _tensors(kind, reference) for part in gguf_experts.split(*tensor))
    for name, array in tensors:
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias", ".scale"))
        assert theirs is not None, name
        array = np.ascontiguousarray(array, dtype=np.float32)
        if _is_quantizable(theirs, array) and quantized(theirs):
            writer.add_tensor(theirs, gguf.quantize(array, type_), raw_dtype=type_)
        else:
            writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vocabulary(writer: gguf.GGUFWriter, size: int, tokenizer: Any) -> None:
    tokens, types = [chr(0x10000 + id_) for id_ in range(size)], [1] * size
    tokens[2], merges = tokens[0] + tokens[1], [f"{tokens[0]} {tokens[1]}"]  # llama.cpp wants at least one
    if tokenizer is not None:
        tokens, types[:2] = [tokenizer.id_to_token(id_) for id_ in range(size)], [3, 3]
        merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
        writer.add_eos_token_id(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)


def _is_quantizable(name: str, array: np.ndarray) -> bool:
    """Whether llama.cpp quantizes a tensor: matrices, but no routers, convolutions, and vectors of more dimensions."""
    kept = ("norm", "ffn_gate_inp", "conv", "ssm_a", "ssm_d", "token_types", "altup", "laurel")
    return name.endswith(".weight") and array.ndim > 1 and array.shape[-1] % 32 == 0 and not any(map(name.count, kept))


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.model_type == "mamba2":
        return gguf_recurrent.write_sizes(writer, config)
    if config.model_type in gguf_shared_keys.ARCHITECTURES:
        return gguf_shared_keys.write_sizes(writer, config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if gguf_latent.has_latents(config):
        gguf_latent.write_sizes(writer, config)
    elif config.model_type != "gpt_neox":
        writer.add_head_count_kv(_kv_heads(config))
    for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        if hasattr(config, name) and config.model_type not in _CONVOLUTIONS:
            writer.add_layer_norm_eps(getattr(config, name))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type in _CONVOLUTIONS:
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_shortconv_l_cache(config.conv_L_cache)
    if gguf_latent.has_latents(config):
        return
    own_head_size = head_size(config) != config.hidden_size // config.num_attention_heads
    if own_head_size or config.model_type.startswith("gemma"):
        writer.add_key_length(head_size(config))
        writer.add_value_length(head_size(config))


def _kv_heads(config: Any) -> int | list[int]:
    """A list if the layers differ: none in a layer without attention."""
    count = getattr(config, "num_key_value_heads", config.num_attention_heads)
    if config.model_type not in _CONVOLUTIONS:
        return count
    return [count if kind == "full_attention" else 0 for kind in config.layer_types]


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = getattr(config, "rope_parameters", None)
    if rope is None or config.model_type in gguf_shared_keys.ARCHITECTURES:
        return
    rope = rope.get("full_attention", rope)
    rotated = int(head_size(config) * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotated)
    if rope["rope_type"] in ("linear", "yarn"):
        kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
        writer.add_rope_scaling_type(kinds[rope["rope_type"]])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "dynamic":
        size = head_size(config)
        writer.add_rope_freq_base(rope["rope_theta"] * rope["alpha"] ** (size / (size - 2)))
    else:
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    if rope["rope_type"] == "llama3":
        plain = 1 / rope["rope_theta"] ** (np.arange(0, rotated, 2, dtype=np.float32) / rotated)
        writer.add_tensor("rope_freqs.weight", _llama3_factors(plain, rope))
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], dtype=np.float32))
        trained = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / trained
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(trained))))


def _llama3_factors(frequencies: np.ndarray, rope: dict[str, Any]) -> np.ndarray:
    factors = []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _write_mechanisms(writer: gguf.GGUFWriter, kind: str, config: Any) -> None:
    if kind in ("gemma2", "gemma3_text", "phi3", "cohere2", "olmo3", "exaone4") and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
        if kind in ("olmo3", "exaone4"):
            writer.add_sliding_window_pattern([layer == "sliding_attention" for layer in config.layer_types])
    if kind in ("cohere", "cohere2"):
        writer.add_logit_scale(config.logit_scale)
    if kind == "ministral3":
        writer.add_rope_scaling_yarn_log_mul(config.rope_parameters["mscale_all_dim"])
        writer.add_attn_temperature_scale(config.rope_parameters["llama_4_scaling_beta"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "gpt_oss":
        gguf_gpt_oss.write_keys(writer, config)
    gguf_experts.write_keys(writer, config)
    if gguf_hybrids.is_hybrid(config):
        gguf_hybrids.write_keys(writer, config)
    if kind == "jamba":
        gguf_jamba.write_keys(writer, config)
    if gguf_delta_nets.has_delta_nets(config):
        gguf_delta_nets.write_keys(writer, config)
    if kind in ("granite", "granitemoe", "granitemoehybrid"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if kind in ("gpt_neox", "stablelm"):
        writer.add_parallel_residual(config.use_parallel_residual)


def _write_slopes(writer: gguf.GGUFWriter, reference: Any) -> None:
    """xIELU's numbers of each layer."""
    activations = [layer.mlp.act_fn for layer in reference.model.layers]
    for name in ("alpha_p", "alpha_n", "beta", "eps"):
        getattr(writer, f"add_xielu_{name}")([getattr(activation, name).item() for activation in activations])


def _tensors(kind: str, reference: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The model's tensors in the layouts of llama.cpp."""
    config = reference.config
    stacked: dict[str, list[np.ndarray]] = {}
    interleaved = kind in ("llama", "mistral", "granite", "smollm3", "arcee", "ministral3", "mixtral", "granitemoe")
    interleaved = interleaved or kind in ("granitemoehybrid", "bamba")
    for name, parameter in gguf_experts.named_tensors(reference):
        array = parameter.detach().numpy()
        if ".act_fn." in name:
            continue
        if interleaved and ".q_proj." in name:
            array = interleave(array, config.num_attention_heads)
        elif interleaved and ".k_proj." in name:
            array = interleave(array, config.num_key_value_heads)
        elif kind in ("gemma", "gemma2", "gemma3_text", "nemotron") and name.endswith("norm.weight"):
            array = array + 1
        elif kind == "gpt2" and array.ndim == 2 and ".c_" in name:
            array = array.T
        elif kind == "mamba2":
            name, array = gguf_recurrent.converted(name, array, config.n_groups)
        elif gguf_delta_nets.has_delta_nets(config):
            yield from gguf_delta_nets.converted(name, array, config)
            continue
        elif kind == "jamba":
            array = gguf_jamba.converted(name, array)
        elif gguf_hybrids.is_hybrid(config):
            yield from gguf_hybrids.converted(name, array, config)
            continue
        elif kind in gguf_shared_keys.ARCHITECTURES:
            yield from gguf_shared_keys.converted(name, array, reference)
            continue
        elif kind == "gpt_oss":
            yield from gguf_gpt_oss.converted(name, array)
            continue
        elif ".conv.conv." in name and array.ndim == 3:
            array = array.squeeze(1)
        elif ".query_key_value." in name:
            heads = array.reshape(config.num_attention_heads, 3, -1, *array.shape[1:])
            array = np.concatenate([heads[:, part].reshape(-1, *array.shape[1:]) for part in range(3)])
        elif ".norms." in name:
            stacked.setdefault(name.partition(".norms.")[0], []).append(array)
            continue
        elif ".kv_b_proj." in name:
            yield from gguf_latent.split(name, array, config)
            continue
        yield name, array
    for name, arrays in stacked.items():
        yield f"{name}.weight", np.stack(arrays)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order for a rotation of neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def as_metadata(vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a vocabulary as the reader returns them; those that are None are left out."""
    given = {f"tokenizer.ggml.{name}": value for name, value in vocabulary.items() if value is not None}
    return {name: Strings.of(value) if _are_strings(value) else value for name, value in given.items()}


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
