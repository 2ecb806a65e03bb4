"""What hybrids of attention and Mamba 2 add to `gguf_files`: keys, and layouts of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH

from tests import gguf_recurrent
from tests.families import (
    BOTH_MIXERS,
    FALCON_MULTIPLIERS,
    GRANITE_SCALES,
    MAMBA2,
    NEMOTRON,
    NEMOTRON_EXPERTS,
    ONE_KV_HEAD,
    THREE_HEADS,
)

ARCHITECTURES = {
    "granitemoehybrid": MODEL_ARCH.GRANITE_HYBRID,
    "bamba": MODEL_ARCH.GRANITE_HYBRID,
    "nemotron_h": MODEL_ARCH.NEMOTRON_H,
    "falcon_h1": MODEL_ARCH.FALCON_H1,
}
_ROTATED = MAMBA2 | GRANITE_SCALES | {"layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    (
        "granitemoehybrid",
        MAMBA2 | GRANITE_SCALES | {"layer_types": BOTH_MIXERS, "num_local_experts": 4, "shared_intermediate_size": 28},
    ),
    (
        "granitemoehybrid",
        ONE_KV_HEAD
        | MAMBA2
        | {"layer_types": BOTH_MIXERS[::-1], "num_local_experts": 0, "shared_intermediate_size": 48}
        | {"tie_word_embeddings": True, "mamba_proj_bias": True, "attention_multiplier": 0.2},
    ),
    ("granitemoehybrid", MAMBA2 | {"layer_types": ["linear_attention"] * 3, "num_local_experts": 4}),
    ("granitemoehybrid", _ROTATED | {"num_local_experts": 0, "shared_intermediate_size": 48}),
    ("granitemoehybrid", _ROTATED | {"num_local_experts": 4, "shared_intermediate_size": 28}),
    ("bamba", MAMBA2 | {"attn_layer_indices": [1]}),
    (
        "bamba",
        THREE_HEADS
        | {"mamba_n_heads": 5, "mamba_n_groups": 1, "mamba_d_state": 7, "mamba_d_conv": 3, "head_dim": 12}
        | {"attn_layer_indices": [0, 2], "attention_bias": True, "mlp_bias": True},
    ),
    ("nemotron_h", NEMOTRON | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}),
    (
        "nemotron_h",
        ONE_KV_HEAD
        | NEMOTRON_EXPERTS
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "moe_latent_size": 14}
        | {"norm_topk_prob": False, "routed_scaling_factor": 2.5, "use_bias": True},
    ),
    ("falcon_h1", MAMBA2 | FALCON_MULTIPLIERS | {"mamba_d_ssm": 64, "head_dim": 12}),
    (
        "falcon_h1",
        ONE_KV_HEAD
        | MAMBA2
        | {"mamba_d_ssm": 72, "mamba_d_head": 9, "mamba_rms_norm": True, "mamba_norm_before_gate": False}
        | {"tie_word_embeddings": True, "mamba_conv_bias": False, "head_dim": 20},
    ),
]


def is_hybrid(config: Any) -> bool:
    return config.model_type in ARCHITECTURES


def architecture(config: Any) -> MODEL_ARCH | None:
    """Another architecture for the same family."""
    if config.model_type == "nemotron_h" and "moe" in config.layer_types:
        return MODEL_ARCH.NEMOTRON_H_MOE
    if _attends_everywhere(config):
        return MODEL_ARCH.GRANITE_MOE if config.num_local_experts else MODEL_ARCH.GRANITE
    return None


def _attends_everywhere(config: Any) -> bool:
    return config.model_type == "granitemoehybrid" and "linear_attention" not in config.layer_types


def write_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    """Some replace keys that are written for every family."""
    if config.model_type != "falcon_h1":
        heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
        writer.add_head_count_kv(heads)
    if config.model_type == "nemotron_h":
        return _write_nemotron_keys(writer, config)
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_inner_size(getattr(config, "mamba_d_ssm", None) or config.mamba_expand * config.hidden_size)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)
    if config.model_type == "falcon_h1":
        return
    is_rotated = config.model_type == "bamba" or _attends_everywhere(config)
    writer.add_rope_scaling_finetuned(is_rotated)
    if not is_rotated:
        writer.add_context_length(2**20)
    if config.model_type == "granitemoehybrid":
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def _write_nemotron_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    has_experts = "moe" in config.layer_types
    width = config.moe_intermediate_size if has_experts else config.intermediate_size
    writer.add_feed_forward_length([width if kind in ("mlp", "moe") else 0 for kind in config.layer_types])
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_ssm_inner_size(config.mamba_num_heads * config.mamba_head_dim)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)
    writer.add_rope_scaling_finetuned(False)
    if has_experts:
        writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
    else:
        writer.add_expert_count(0)
    if config.moe_latent_size is not None:
        writer.add_moe_latent_size(config.moe_latent_size)


def converted(name: str, array: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The names that llama.cpp's table knows, and the arrays as they are stored."""
    if config.model_type == "falcon_h1":
        array = array * _multiplier(name, config)
    if config.model_type == "nemotron_h":
        name = name.replace("model.", "backbone.")
    if name.endswith(".mixer.experts.up_proj"):
        yield name.replace("backbone.", "model.").replace(".mixer.", ".mlp.") + ".weight", array
    elif name.endswith(".mixer.experts.down_proj"):
        yield name.replace("backbone.", "model.").replace(".mixer.", ".mlp."), array
    elif ".shared_mlp.input_linear." in name:
        folder = "shared_experts" if config.num_local_experts else "mlp"
        for part, half in zip(("gate", "up"), np.split(array, 2), strict=True):
            yield name.replace("shared_mlp.input_linear", f"mlp.{folder}.{part}_proj").replace("mlp.mlp.", "mlp."), half
    elif ".shared_mlp." in name and not config.num_local_experts:
        yield name.replace("shared_mlp.output_linear", "mlp.down_proj"), array
    else:
        yield gguf_recurrent.converted(name, array, getattr(config, "mamba_n_groups", None) or config.n_groups)


def _multiplier(name: str, config: Any) -> float | np.ndarray:
    """What llama.cpp's converter multiplies a tensor by."""
    gate, down = config.mlp_multipliers
    if ".mamba.in_proj." in name:
        state = config.mamba_n_groups * config.mamba_d_state
        sizes = [config.mamba_d_ssm, config.mamba_d_ssm, state, state, config.mamba_n_heads]
        return config.ssm_in_multiplier * np.repeat(config.ssm_multipliers, sizes)[:, None]
    factors = {
        "down_proj": down,
        "gate_proj": gate,
        "k_proj": config.key_multiplier * config.attention_in_multiplier,
        "q_proj": config.attention_in_multiplier,
        "v_proj": config.attention_in_multiplier,
        "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }
    return factors.get(name.split(".")[-2], 1.0)
