"""Sizes and tensors of state space models in GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np


def write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.num_heads * config.head_dim)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.num_heads)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


def converted(name: str, array: np.ndarray, groups: int) -> tuple[str, np.ndarray]:
    """Return the name that llama.cpp's table knows, and the array as Mamba 2 stores it."""
    if name.endswith(".dt_bias"):
        return f"{name.removesuffix('.dt_bias')}.dt_proj.bias", array
    if name.endswith(".A_log"):
        return name, -np.exp(array)[:, None]
    if name.endswith(".D"):
        return name, array[:, None]
    if name.endswith((".mamba.norm.weight", ".mixer.norm.weight")):
        return name, array.reshape(groups, -1)
    return name, array.squeeze(1) if ".conv1d.weight" in name else array
