"""Long contexts: kvgen against llama.cpp, with caches of each type; prefill, and decode behind it.

    python benchmarks/long.py                        # 8,000 positions of the default model
    python benchmarks/long.py --tokens 32000 --runs 1

Each engine runs alone in a process, in turn with the others; medians. Speed does not depend on the context length that
the model was trained for. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from peers import LONG_CONTEXT
from speed import Engine, machine, prepare, say, table

OURS = ("kvgen", "kvgen, bf16 cache", "kvgen, int8 cache")
THEIRS = (
    "llama.cpp, f16 cache",
    "llama.cpp, f16 cache, flash attention",
    "llama.cpp, q8_0 cache, flash attention",
)
WARM_UP, ROOM = 512, 100


def alternate(engines: Sequence[Engine], tokens: int, runs: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each engine: of a whole prefill, and of one step behind it."""
    for engine in engines:
        engine.ask("prefill", tokens=WARM_UP)
    times: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
    for run in range(runs):
        for engine in engines:
            prefill, step = engine.ask("prefill_and_decode", tokens=tokens)
            times[engine.name].append((prefill, step))
            say(f"run {run + 1} of {runs}, {engine.name}: prefill {prefill:.1f} s, step {1000 * step:.1f} ms")
    return {
        name: (statistics.median(prefill for prefill, _ in taken), statistics.median(step for _, step in taken))
        for name, taken in times.items()
    }


def write(seconds: dict[str, tuple[float, float]], memory: dict[str, float], tokens: int) -> str:
    """The speeds, and how many times that of the fastest llama.cpp each is."""
    best = [min(seconds[name][i] for name in THEIRS) for i in range(2)]
    rows = []
    for name, (prefill, step) in seconds.items():
        speeds = [f"{tokens / prefill:,.0f}", f"{best[0] / prefill:.2f}", f"{1 / step:,.1f}", f"{best[1] / step:.2f}"]
        rows.append([name, *speeds, f"{memory[name]:,.0f}"])
    times = "times the best llama.cpp"
    return table(["", f"prefill {tokens:,}", times, f"decode at {tokens:,}", times, "peak MB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000, help=f"length of the prompt, up to {LONG_CONTEXT - ROOM}")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if not WARM_UP <= options.tokens <= LONG_CONTEXT - ROOM:
        parser.error(f"--tokens must be from {WARM_UP} to {LONG_CONTEXT - ROOM}")
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        prepare(folder, [])
        engines = [Engine(name, folder) for name in (*OURS, *THEIRS)]
        seconds = alternate(engines, options.tokens, options.runs)
        memory = {engine.name: engine.ask("memory") for engine in engines}
        for engine in engines:
            engine.close()
    sys.stdout.write(f"{time.strftime('%Y-%m-%d')}, {machine()}.\n\n{write(seconds, memory, options.tokens)}\n")


if __name__ == "__main__":
    main()
