"""What `kvgen compare --wrong-pattern` costs, against one generated token.

    python benchmarks/compare.py                     # the default model, and a random one of a billion parameters
    python benchmarks/compare.py --eight-billion     # and a random one of eight, in 4 bits: 4.5 GB on disk

Every measurement is a whole process: wall time and the highest resident memory, medians of several runs that alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from load import write_billion

PROMPTS = {"text": "Once upon a time,", "ids": "11 502 77 9 1843"}
EIGHT_BILLION = {"dim": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256}


def write_eight_billion(path: Path) -> Path:
    """A random model of Llama 3's shape in Q4_0."""
    if path.exists():
        return path
    sizes, generator = EIGHT_BILLION, np.random.default_rng(0)
    dim, ffn, kv_dim = sizes["dim"], sizes["ffn"], sizes["dim"] * sizes["kv_heads"] // sizes["heads"]
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(dim)
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(sizes["vocab"])
    writer.add_rope_dimension_count(dim // sizes["heads"])
    shapes = {"attn_q": (dim, dim), "attn_k": (kv_dim, dim), "attn_v": (kv_dim, dim), "attn_output": (dim, dim)}
    shapes |= {"ffn_gate": (ffn, dim), "ffn_up": (ffn, dim), "ffn_down": (dim, ffn)}
    matrices = {"token_embd": (sizes["vocab"], dim), "output": (sizes["vocab"], dim)}
    vectors = ["output_norm"]
    for layer in range(sizes["layers"]):
        matrices |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
        vectors += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    for name in vectors:
        writer.add_tensor(f"{name}.weight", np.ones(dim, dtype=np.float32))
    for name, (rows, columns) in matrices.items():
        blocks = np.empty((rows, columns // 32, 18), dtype=np.uint8)
        blocks[..., 2:] = generator.integers(0, 256, (rows, columns // 32, 16), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.004).tobytes(), dtype=np.uint8)
        quantized = blocks.reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").rename(path)
    return path


def run(*arguments: str) -> tuple[float, float]:
    """Seconds and peak megabytes of a kvgen process."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "kvgen", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"kvgen {' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1e3


def measure(name: str, model: list[str], prompt: str, runs: int) -> None:
    given = [*model, "-p", prompt]
    commands = {"generate": ["generate", *given, "-n", "1"], "compare": ["compare", *given, "--wrong-pattern"]}
    results = {command: [] for command in commands}
    for _ in range(runs):
        for command, arguments in commands.items():
            results[command].append(run(*arguments))
    medians = {
        command: tuple(statistics.median(column) for column in zip(*of_command, strict=True))
        for command, of_command in results.items()
    }
    seconds, peak = (medians["compare"][i] / medians["generate"][i] for i in range(2))
    figures = {command: f"{wall:.2f} s, {memory:.0f} MB" for command, (wall, memory) in medians.items()}
    sys.stdout.write(f"{name}: {json.dumps(figures)}, compare / generate {seconds:.2f} in time, {peak:.2f} in memory\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--eight-billion", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.gettempdir())
    measure("default model", [], PROMPTS["text"], options.runs)
    billion = ["-m", str(write_billion(folder / "kvgen-billion")), "--ids"]
    measure("1.07 billion, bfloat16", billion, PROMPTS["ids"], options.runs)
    if options.eight_billion:
        eight = ["-m", str(write_eight_billion(folder / "kvgen-eight-billion.gguf")), "--ids"]
        measure("8.03 billion, Q4_0", eight, PROMPTS["ids"], 1)


if __name__ == "__main__":
    main()
