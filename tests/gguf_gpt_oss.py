"""What gpt-oss adds to `gguf_files`: gate and up are stored in turns, and sinks have a name of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH

from tests.families import BETWEEN_PAIRS, LINEAR, ONE_KV_HEAD

ARCHITECTURES = {"gpt_oss": MODEL_ARCH.GPT_OSS}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    (
        "gpt_oss",
        BETWEEN_PAIRS | {"head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    ),
    (
        "gpt_oss",
        ONE_KV_HEAD
        | LINEAR
        | {"head_dim": 6, "num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 4}
        | {"tie_word_embeddings": True, "num_hidden_layers": 4, "intermediate_size": 25},
    ),
]


def write_keys(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def converted(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor under the names that llama.cpp's converter gives it before it looks them up."""
    stem, _, part = name.rpartition(".")
    if part == "sinks":
        yield f"{name}.weight", array
    elif part.startswith(("gate_up_proj", "down_proj")) and stem.endswith(".experts"):
        kind = "bias" if part.endswith("_bias") else "weight"
        rows = array if kind == "bias" else array.swapaxes(1, 2)
        halves = {"gate": rows[:, ::2], "up": rows[:, 1::2]} if part.startswith("gate_up") else {"down": rows}
        for projection, half in halves.items():
            yield f"{stem}.{projection}_proj.{kind}", half
    else:
        yield name, array
