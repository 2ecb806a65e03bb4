"""What mixtures of experts add to `gguf_files`: keys, and one tensor for all experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH

from tests.families import DEEPSEEK, EXPERTS, GRANITE_SCALES, ONE_KV_HEAD

ARCHITECTURES = {
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "mixtral": MODEL_ARCH.LLAMA,
    "olmoe": MODEL_ARCH.OLMOE,
    "qwen2_moe": MODEL_ARCH.QWEN2MOE,
    "glm4_moe": MODEL_ARCH.GLM4_MOE,
    "dots1": MODEL_ARCH.DOTS1,
    "ernie4_5_moe": MODEL_ARCH.ERNIE4_5_MOE,
    "granitemoe": MODEL_ARCH.GRANITE_MOE,
    "lfm2_moe": MODEL_ARCH.LFM2MOE,
}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", EXPERTS | {"head_dim": 12, "norm_topk_prob": True}),
    ("mixtral", ONE_KV_HEAD | {"num_local_experts": 4}),
    ("olmoe", {"num_experts": 4, "num_experts_per_tok": 3}),
    ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 28}),
    ("glm4_moe", DEEPSEEK | {"head_dim": 12, "use_qk_norm": True, "num_nextn_predict_layers": 0}),
    (
        "lfm2_moe",
        EXPERTS | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_experts_per_tok": 3},
    ),
    ("dots1", DEEPSEEK | {"sliding_window": None, "norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    ("ernie4_5_moe", {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 20, "head_dim": 12}),
    ("granitemoe", GRANITE_SCALES | {"num_local_experts": 4}),
]

_SELECTION_BIASES = ("e_score_correction_bias", ".expert_bias")


def write_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    keys = {
        "num_local_experts": writer.add_expert_count,
        "num_experts": writer.add_expert_count,
        "n_routed_experts": writer.add_expert_count,
        "moe_num_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_k": writer.add_expert_used_count,
        "n_shared_experts": writer.add_expert_shared_count,
        "n_group": writer.add_expert_group_count,
        "topk_group": writer.add_expert_group_used_count,
        "routed_scaling_factor": writer.add_expert_weights_scale,
        "first_k_dense_replace": writer.add_leading_dense_block_count,
        "num_dense_layers": writer.add_leading_dense_block_count,
        "moe_layer_start_index": writer.add_leading_dense_block_count,
        "moe_layer_interval": writer.add_interleave_moe_layer_step,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
    }
    values = config.to_dict()
    for name, add in keys.items():
        if values.get(name) is not None:
            add(values[name])
    if "routed_scaling_factor" in values:
        writer.add_expert_weights_norm(values["norm_topk_prob"])
        is_softmax = config.model_type == "deepseek_v2"
        scores = gguf.ExpertGatingFuncType.SOFTMAX if is_softmax else gguf.ExpertGatingFuncType.SIGMOID
        writer.add_expert_gating_func(scores)
    if values.get("moe_num_shared_experts"):
        writer.add_expert_shared_feed_forward_length(values["moe_intermediate_size"] * values["moe_num_shared_experts"])


def named_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """The model's parameters, and what transformers keeps in buffers: biases for choosing experts, scales of layers."""
    yield from model.named_parameters()
    stored = (*_SELECTION_BIASES, ".layer_scalar")
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(stored))


def split(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Split gate and up; name tensors as llama.cpp's converter does before it looks them up."""
    name = name.replace(".block_sparse_moe.", ".mlp.").replace(".mlp.router.", ".mlp.gate.")
    if name.endswith(".experts.gate_up_proj"):
        for part, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
            yield name.replace("gate_up_proj", f"{part}_proj.weight"), half
    elif name.endswith(".experts.down_proj"):
        yield f"{name}.weight", array
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("moe_statics.", "").replace("_correction_bias", "_correction.bias"), array
    elif name.endswith(".expert_bias"):
        yield f"{name}.bias", array
    else:
        yield name, array.squeeze() if "shared_expert_gate" in name else array


def is_expert(name: str) -> bool:
    """Whether a tensor has the weights of all chosen experts of a layer."""
    return name.endswith("_exps.weight")
