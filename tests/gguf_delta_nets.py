"""What gated delta nets add to `gguf_files`: keys, and tensors as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH

from tests.families import DELTA_NETS, EVERY_FOURTH, EXPERTS, HALF_ROTATED, ONE_KEY_HEAD

ARCHITECTURES = {
    "qwen3_next": MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_text": MODEL_ARCH.QWEN35,
    "qwen3_5_moe_text": MODEL_ARCH.QWEN35MOE,
}
_EVERY_SECOND = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_MIXTURE = DELTA_NETS | _EVERY_SECOND | EXPERTS | {"shared_expert_intermediate_size": 28}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_next", _MIXTURE),
    ("qwen3_next", _MIXTURE | ONE_KEY_HEAD | EVERY_FOURTH | {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3_5_text", DELTA_NETS | _EVERY_SECOND | {"linear_num_value_heads": 6, "tie_word_embeddings": True}),
    ("qwen3_5_text", ONE_KEY_HEAD | EVERY_FOURTH | HALF_ROTATED | {"attention_bias": True}),
    ("qwen3_5_text", DELTA_NETS | {"layer_types": ["full_attention", "linear_attention", "linear_attention"]}),
    ("qwen3_5_moe_text", _MIXTURE),
]


def has_delta_nets(config: Any) -> bool:
    return config.model_type in ARCHITECTURES


def write_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    interval = config.layer_types.index("full_attention") + 1
    writer.add_full_attention_interval(interval)
    recurrent = [kind == "linear_attention" for kind in config.layer_types]
    if recurrent != [(layer + 1) % interval != 0 for layer in range(len(recurrent))]:  # older files lack it
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)
    if config.model_type != "qwen3_next":
        writer.add_rope_dimension_sections([1, 1, 0, 0])  # for images


def converted(name: str, array: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Return the names that llama.cpp's table knows, and the arrays as they are stored."""
    if config.model_type != "qwen3_next" and ".linear_attn." in name:
        array = _tiled(name, array, config)
    if name.endswith(".A_log"):
        yield name, -np.exp(array)
    elif name.endswith(".dt_bias"):
        yield f"{name.removesuffix('.dt_bias')}.dt_proj.bias", array
    elif ".conv1d." in name:
        yield name, array.squeeze(1)
    elif name.endswith("norm.weight") and ".linear_attn." not in name:
        yield name, array + 1
    elif ".in_proj_qkvz." in name:
        qkv, z = split_by_part(array, config)
        yield name.replace("qkvz", "qkv"), qkv
        yield name.replace("qkvz", "z"), z
    else:
        yield name, array


def split_by_part(rows: np.ndarray, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Split what is stored for each head of keys into queries, keys and values of all heads, and z of all heads."""
    values = config.linear_value_head_dim * config.linear_num_value_heads // config.linear_num_key_heads
    ends = np.cumsum([config.linear_key_head_dim, config.linear_key_head_dim, values])
    parts = np.split(rows.reshape(config.linear_num_key_heads, -1, rows.shape[-1]), ends, axis=1)
    q, k, v, z = (part.reshape(-1, rows.shape[-1]) for part in parts)
    return np.concatenate((q, k, v)), z


def _tiled(name: str, array: np.ndarray, config: Any) -> np.ndarray:
    """The heads of values in the order of ggml's broadcasts: the first of each head of keys, then the second ones."""
    key_heads, heads = config.linear_num_key_heads, config.linear_num_value_heads
    keys = 2 * key_heads * config.linear_key_head_dim

    def tile(rows: np.ndarray) -> np.ndarray:
        grouped = rows.reshape(key_heads, heads // key_heads, -1, *rows.shape[1:])
        return grouped.swapaxes(0, 1).reshape(rows.shape)

    if ".in_proj_qkv." in name or ".conv1d." in name:
        return np.concatenate((array[:keys], tile(array[keys:])))
    if ".out_proj." in name:
        return tile(array.T).T
    return array if ".norm." in name else tile(array)
