"""Gemma 3n and 4 in GGUF files, as llama.cpp's converter writes them: sizes, keys and tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH

from tests.families import GEMMA3N, GEMMA4, GEMMA4_EXPERTS, ONE_KV_HEAD

ARCHITECTURES = {"gemma3n_text": MODEL_ARCH.GEMMA3N, "gemma4_text": MODEL_ARCH.GEMMA4}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("gemma3n_text", GEMMA3N | {"final_logit_softcapping": 3.0}),
    ("gemma3n_text", GEMMA3N | ONE_KV_HEAD | {"altup_num_inputs": 2, "altup_active_idx": 1, "num_kv_shared_layers": 3}),
    (
        "gemma4_text",
        GEMMA4 | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 3.0},
    ),
    (
        "gemma4_text",
        GEMMA4
        | GEMMA4_EXPERTS
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    ("gemma4_text", GEMMA4 | ONE_KV_HEAD | GEMMA4_EXPERTS | {"hidden_size_per_layer_input": 5, "head_dim": 20}),
]


def write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(slides)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma4_text":
        _write_gemma4(writer, config)
    else:
        _write_gemma3n(writer, config)


def _write_gemma3n(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_altup_num_inputs(config.altup_num_inputs)
    writer.add_altup_active_idx(config.altup_active_idx)
    quantiles = torch.erfinv(2 * torch.tensor(config.activation_sparsity_pattern) - 1) * 2**0.5
    writer.add_activation_sparsity_scale(quantiles.tolist())


def _write_gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    layers = [config.per_layer_config[number] for number in range(config.num_hidden_layers)]
    full, local = (layers[config.layer_types.index(kind)] for kind in ("full_attention", "sliding_attention"))
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(local.head_dim)
    writer.add_value_length_swa(local.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(local.head_dim)
    writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    width, first_shared = config.intermediate_size, config.num_hidden_layers - config.num_kv_shared_layers
    wide = 2 * width if config.use_double_wide_mlp else width
    writer.add_feed_forward_length([width if i < first_shared else wide for i in range(config.num_hidden_layers)])
    if config.enable_moe_block:
        writer.add_expert_used_count(config.top_k_experts)
    turned = int(full.head_dim * config.rope_parameters["full_attention"]["partial_rotary_factor"] / 2)
    factors = [1.0] * turned + [1e30] * (full.head_dim // 2 - turned)
    writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))


def converted(name: str, array: np.ndarray, reference: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensor under the name that llama.cpp's table knows."""
    if found := re.match(r"model\.(altup_\w+)\.(\d+)\.weight", name):
        if found[2] == "0":
            parts = getattr(reference.model, found[1])
            yield f"model.{found[1]}.weight", np.stack([part.weight.detach().numpy() for part in parts])
        return
    if name.endswith(".router.scale"):
        name = name.replace(".router.scale", ".router.proj.scale")
    elif name.endswith(".per_expert_scale"):
        name = name.replace(".router.per_expert_scale", ".experts.down_proj.scale")
    elif name.endswith((".layer_scalar", ".gate_up_proj", ".down_proj", ".correct_output_scale")):
        name = f"{name}.weight"
    yield name, array
