"""Sizes and tensors of latent attention in GGUF files, as llama.cpp's converter writes them.

Models without a query latent (as DeepSeek-V2-Lite) are written as before May 2025: with the sizes of heads, and with
keys and values in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH

from tests.families import EVEN, LATENT, THREE_HEADS, latent_yarn

ARCHITECTURES = dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), MODEL_ARCH.DEEPSEEK2)
ONE_GROUP = {"n_group": 1, "topk_group": 1}
# llama.cpp takes mscale and mscale_all_dim to be equal, and norms of latents to have the epsilon of the others.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v2", LATENT | EVEN | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.5}),
    ("deepseek_v2", LATENT | EVEN | ONE_GROUP | latent_yarn(0.7, 0.7) | {"q_lora_rank": None, "n_shared_experts": 2}),
    ("deepseek_v3", LATENT | latent_yarn(1.0, 1.0) | {"routed_scaling_factor": 2.5, "num_mtp_layers": 0}),
    ("deepseek_v3", LATENT | THREE_HEADS | {"q_lora_rank": None, "num_mtp_layers": 0}),
    ("glm4_moe_lite", LATENT | ONE_GROUP | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
]


def has_latents(config: Any) -> bool:
    return hasattr(config, "kv_lora_rank")


def _is_old(config: Any) -> bool:
    return config.q_lora_rank is None


def write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if _is_old(config):
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(key)
        writer.add_value_length(value)
    else:
        writer.add_q_lora_rank(config.q_lora_rank)
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(value)
    if mscale := config.rope_parameters.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * mscale)


def split(name: str, array: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Split the projection of the latent to keys and values, which are stored for each head, the keys transposed."""
    if not name.endswith("kv_b_proj.weight") or _is_old(config):
        yield name, array
        return
    heads = array.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = np.split(heads, [config.qk_nope_head_dim], axis=1)
    yield name.replace("kv_b_proj", "k_b_proj"), keys.swapaxes(1, 2)
    yield name.replace("kv_b_proj", "v_b_proj"), values
