"""Decode one sequence on a GPU: kvgen beside transformers, in bf16, and the share of the memory bandwidth they reach.

    python benchmarks/gpu.py [--folder FOLDER]

The model is random, of the shape of Llama 3.2 1B, and is made in FOLDER. Each number is the median of five runs of 64
steps; the programs take turns. "kvgen" is its `Batch`, greedily; "contract" is the model alone, which is called with
the likeliest token; transformers is its `generate`, by default and with a static cache, for which it compiles.
The bandwidth is that of a copy of 2 GB, counting bytes read and written; a step reads all weights, and the keys and
values so far.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

import kvgen
from kvgen.contract import Backend

CONTEXTS = (16, 512, 2048, 8192)
STEPS, RUNS = 64, 5
SHAPE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
POSITION_BYTES = 16 * 2 * 8 * 64 * 2  # layers, keys and values, heads, dimensions, bytes

Run = Callable[[int], float]
"""From the length of a prompt to seconds for each step after it."""


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def copy_bandwidth() -> float:
    """Bytes read and written per second, best of ten."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def kvgen_run(loaded: kvgen.Loaded, prompt: list[int]) -> Run:
    greedy = kvgen.Sampling(temperature=0)

    def run(context: int) -> float:
        times = []
        for _ in kvgen.Batch(loaded).complete(kvgen.Request(prompt[:context], greedy, max_tokens=STEPS + 1)):
            times.append(time.perf_counter())
        return (times[-1] - times[0]) / STEPS

    return run


def contract_run(model: Backend, prompt: list[int]) -> Run:
    def run(context: int) -> float:
        ids = model.ids_tensor(prompt[:context] + [0] * (STEPS + 1))
        logits, cache = model(ids[:, :context], None)
        times = []
        for position in range(context, context + STEPS + 1):
            ids[0, position] = int(logits[0, -1].argmax())  # waits for the GPU
            times.append(time.perf_counter())
            logits, cache = model(ids[:, : position + 1], cache)
        return (times[-1] - times[0]) / STEPS

    return run


def transformers_run(reference: LlamaForCausalLM, prompt: list[int], static: bool) -> Run:
    caches: dict[int, StaticCache] = {}  # kept, since each is captured

    def seconds(context: int, tokens: int) -> float:
        ids = torch.tensor([prompt[:context]], device="cuda")
        options = {}
        if static:
            if context not in caches:
                caches[context] = StaticCache(reference.config, context + STEPS + 2)
            caches[context].reset()
            options["past_key_values"] = caches[context]
        torch.cuda.synchronize()
        start = time.perf_counter()
        reference.generate(
            *(ids, GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)),
            attention_mask=torch.ones_like(ids),
            **options,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def run(context: int) -> float:
        return (seconds(context, STEPS + 1) - seconds(context, 1)) / STEPS

    return run


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/kvgen-gpu-1b"))
    folder = parser.parse_args().folder
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        with torch.device("cuda"):
            LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    weights = sum(parameter.nbytes for parameter in reference.parameters())
    bandwidth = copy_bandwidth()
    loaded = kvgen.load(folder, tokenizer="ids", device="cuda")
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    say(f"a copy: {bandwidth / 1e9:.0f} GB/s; kvgen's engine: {loaded.model.engine}")
    prompt = torch.randint(
        0, SHAPE["vocab_size"], (max(CONTEXTS),), generator=torch.Generator().manual_seed(0)
    ).tolist()
    runs = {
        "kvgen": kvgen_run(loaded, prompt),
        "contract": contract_run(loaded.model, prompt),
        "transformers, static": transformers_run(reference, prompt, static=True),
        "transformers": transformers_run(reference, prompt, static=False),
    }
    say("| context | " + " | ".join(f"{name}: ms | tokens/s | of bandwidth" for name in runs) + " |")
    say("|---|" + "---|" * 3 * len(runs))
    for run in runs.values():  # compiles
        for context in CONTEXTS:
            run(context)
    for context in CONTEXTS:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(RUNS):
            for name, run in runs.items():
                times[name].append(run(context))
        read = weights + (context + STEPS // 2) * POSITION_BYTES
        medians = map(statistics.median, times.values())
        cells = (f"{1e3 * each:.3f} | {1 / each:.0f} | {read / each / bandwidth:.0%}" for each in medians)
        say(f"| {context} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
