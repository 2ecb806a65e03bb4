"""kvgen against llama.cpp on models of other kinds: hybrids and a mixture, with random weights in Q4_1.

    python benchmarks/shapes.py [NAME ...]

Speed depends on the sizes of a model, not on its weights. Each engine runs alone in a process, in turn with the other;
medians. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType

sys.path.insert(0, str(Path(__file__).parent.parent))

from speed import Engine, alternate, say

from tests.gguf_files import write_gguf

PROMPTS, CONTEXTS = (128, 512), (16, 1024)
KV_HEADS = "num_key_value_heads"
Model = tuple[str, Any, Any]  # the kind, and the classes of its config and model


def attending(layers: int, attends: Callable[[int], bool], other: str) -> list[str]:
    return ["full_attention" if attends(i) else other for i in range(layers)]


SHAPES: Mapping[str, tuple[Model, dict[str, Any]]] = {
    "LFM2-350M": (
        ("lfm2", transformers.Lfm2Config, transformers.Lfm2ForCausalLM),
        {"vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 4608, "block_auto_adjust_ff_dim": False}
        | {"num_hidden_layers": 16, "num_attention_heads": 16, KV_HEADS: 8, "conv_L_cache": 3}
        | {"layer_types": attending(16, lambda i: i in (2, 5, 8, 10, 12, 14), "conv")},
    ),
    "Qwen3.5-0.8B": (
        ("qwen3_5_text", transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM),
        {"vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24}
        | {"num_attention_heads": 8, KV_HEADS: 2, "head_dim": 256, "linear_conv_kernel_dim": 4}
        | {"linear_num_key_heads": 16, "linear_num_value_heads": 16}
        | {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "tie_word_embeddings": True}
        | {"layer_types": attending(24, lambda i: i % 4 == 3, "linear_attention")},
    ),
    "Granite-4.0-H-350M": (
        ("granitemoehybrid", transformers.GraniteMoeHybridConfig, transformers.GraniteMoeHybridForCausalLM),
        {"vocab_size": 100352, "hidden_size": 768, "num_hidden_layers": 32, "num_attention_heads": 12, KV_HEADS: 4}
        | {"mamba_n_heads": 48, "mamba_d_head": 32, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2}
        | {"shared_intermediate_size": 2048, "intermediate_size": 2048, "num_local_experts": 0}
        | {"num_experts_per_tok": 0, "position_embedding_type": "nope", "tie_word_embeddings": True}
        | {"layer_types": attending(32, lambda i: i in (10, 13, 17, 27), "linear_attention")},
    ),
    "Granite-3.1-1B-A400M": (
        ("granitemoe", transformers.GraniteMoeConfig, transformers.GraniteMoeForCausalLM),
        {"vocab_size": 49155, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24}
        | {"num_attention_heads": 16, KV_HEADS: 8, "num_local_experts": 32, "num_experts_per_tok": 8}
        | {"tie_word_embeddings": True},
    ),
}


def write(name: str, folder: Path) -> None:
    (kind, config, model), sizes = SHAPES[name]
    torch.manual_seed(0)
    write_gguf(folder / "model.gguf", kind, model(config(**sizes)), type_=GGMLQuantizationType.Q4_1)


def measure(name: str, runs: int) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        say(f"{name}: writing")
        write(name, folder)
        engines = [Engine(engine, folder) for engine in ("kvgen", "llama.cpp")]
        rows = [("prefill", length) for length in PROMPTS] + [("decode", length) for length in CONTEXTS]
        for what, length in rows:
            ours, theirs = alternate(engines, what, length, runs).values()
            speeds = [(length if what == "prefill" else 1) / seconds for seconds in (ours, theirs)]
            sys.stdout.write(
                f"| {name} | {what} | {length:,} | {speeds[0]:.0f} | {speeds[1]:.0f} | {theirs / ours:.2f} |\n"
            )
        for engine in engines:
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *SHAPES], help="which; all if none is named")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    for name in options.names or SHAPES:
        measure(name, options.runs)


if __name__ == "__main__":
    main()
