"""What Jamba adds to `gguf_files`: keys, and layouts of tensors."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH

from tests.families import JAMBA, ONE_KV_HEAD

ARCHITECTURES = {"jamba": MODEL_ARCH.JAMBA}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("jamba", JAMBA | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_hidden_layers": 4}),
    (
        "jamba",
        ONE_KV_HEAD
        | {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 0, "mamba_dt_rank": 5, "mamba_d_state": 7}
        | {"mamba_d_conv": 3, "tie_word_embeddings": True},
    ),
]


def write_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    """One replaces a key that is written for every family."""
    kinds = config.layers_block_type
    writer.add_head_count_kv([config.num_key_value_heads if kind == "attention" else 0 for kind in kinds])
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_time_step_rank(config.mamba_dt_rank)


def converted(name: str, array: np.ndarray) -> np.ndarray:
    """Return a tensor as it is stored."""
    return -np.exp(array) if name.endswith(".A_log") else array.squeeze(1) if name.endswith("conv1d.weight") else array
