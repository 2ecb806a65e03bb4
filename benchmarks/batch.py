"""Rows a second: kvgen's batch, a loop of single completions, and llama.cpp's parallel decoding, of the same rows.

    python benchmarks/batch.py [--rows 1000] [--tokens 32] [--runs 3]

In turn, each in this process, greedily, with the default model; medians. llama.cpp is left out where
llama-cpp-python is not installed. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import kvgen
from kvgen.generation.batch import Batch
from kvgen.generation.settings import Request

NOUNS = (
    "river",
    "moon",
    "castle",
    "engine",
    "bread",
    "winter",
    "garden",
    "music",
    "ocean",
    "forest",
    "stone",
    "letter",
)
GREEDY = kvgen.Sampling(temperature=0)
PARALLEL = 64
Texts = list[list[int]]


def prompts(count: int) -> list[str]:
    return [f"The {NOUNS[n % 12]} of the {NOUNS[(n * 7 + n // 12) % 12]}, number {n}, was" for n in range(count)]


def in_a_batch(loaded: kvgen.Loaded, rows: Texts, tokens: int) -> Texts:
    found: Texts = [[] for _ in rows]
    requests = (Request(ids, GREEDY, tokens) for ids in rows)
    for number, event in Batch(loaded, batch_size=PARALLEL).run(requests):
        assert isinstance(event, kvgen.Chunk)
        found[number].append(event.step.token)
    return found


def one_by_one(loaded: kvgen.Loaded, rows: Texts, tokens: int) -> Texts:
    return [[chunk.step.token for chunk in kvgen.stream(loaded, ids, GREEDY, max_tokens=tokens)] for ids in rows]


class LlamaCpp:
    """What llama.cpp's own example `parallel` does: a sequence for each slot, and one batch of tokens a step."""

    def __init__(self, path: str) -> None:
        import llama_cpp
        import numpy

        self.api, self.numpy = llama_cpp, numpy
        options = {"n_ctx": PARALLEL * 64, "n_seq_max": PARALLEL, "n_batch": 2048, "n_ubatch": 512, "kv_unified": True}
        threads = os.cpu_count() or 1
        parameters = llama_cpp.llama_context_default_params()
        for name, value in {**options, "n_threads": threads, "n_threads_batch": threads}.items():
            setattr(parameters, name, value)
        llama_cpp.llama_backend_init()
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)  # kept: llama.cpp calls it later
        llama_cpp.llama_log_set(self.silence, None)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.is_end = lambda token: llama_cpp.llama_vocab_is_eog(vocabulary, token)
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def __call__(self, rows: Texts, tokens: int) -> Texts:
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_clear(memory, True)
        found: Texts = [[] for _ in rows]
        slots: dict[int, int] = {}  # slot: row
        waiting = iter(range(len(rows)))
        new: dict[int, list[int]] = {}  # slot: what it reads next
        while True:
            for slot in range(PARALLEL):
                if slot not in slots and (row := next(waiting, None)) is not None:
                    slots[slot], new[slot] = row, rows[row]
            if not slots:
                return found
            for slot, token in self._step(slots, new, rows, found):
                row = slots[slot]
                found[row].append(token)
                new[slot] = [token]
                if self.is_end(token) or len(found[row]) == tokens:
                    self.api.llama_memory_seq_rm(memory, slot, -1, -1)
                    del slots[slot], new[slot]

    def _step(self, slots: dict[int, int], new: dict[int, list[int]], rows: Texts, found: Texts) -> Any:
        batch, count, ends = self.batch, 0, []
        for slot, row in slots.items():
            past = len(rows[row]) + len(found[row]) - len(new[slot])
            for offset, token in enumerate(new[slot]):
                batch.token[count], batch.pos[count] = token, past + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, slot
                batch.logits[count] = offset == len(new[slot]) - 1
                count += 1
            ends.append((slot, count - 1))
        batch.n_tokens = count
        assert self.api.llama_decode(self.context, batch) == 0
        for slot, at in ends:
            logits = self.api.llama_get_logits_ith(self.context, at)
            yield slot, int(self.numpy.ctypeslib.as_array(logits, (self.size,)).argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    loaded = kvgen.load()
    rows = [loaded.tokenizer.encode(prompt) for prompt in prompts(options.rows)]
    ways: dict[str, Callable[[Texts, int], Texts]] = {
        "kvgen, in a batch": lambda rows, tokens: in_a_batch(loaded, rows, tokens),
        "kvgen, one by one": lambda rows, tokens: one_by_one(loaded, rows, tokens),
    }
    with contextlib.suppress(ImportError):
        ways["llama.cpp, in parallel"] = LlamaCpp(loaded.source)
    times: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, Texts] = {}
    for way in ways.values():
        way(rows[:PARALLEL], 2)
    for _ in range(options.runs):
        for name, way in ways.items():
            start = time.perf_counter()
            texts[name] = way(rows, options.tokens)
            times[name].append(time.perf_counter() - start)
    batch, single = (texts[name] for name in ("kvgen, in a batch", "kvgen, one by one"))
    prompt_tokens = sum(map(len, rows)) / len(rows)
    sys.stdout.write(f"{len(rows)} rows, {prompt_tokens:.1f} prompt tokens on average; batch and single ")
    sys.stdout.write(f"{'give the same tokens' if batch == single else 'DIFFER'}\n\n")
    sys.stdout.write("| | seconds | rows/s | tokens/s | kvgen's batch is faster by |\n|---|---:|---:|---:|---:|\n")
    for name, taken in times.items():
        seconds, tokens = statistics.median(taken), sum(map(len, texts[name]))
        ratio = statistics.median(a / b for a, b in zip(taken, times["kvgen, in a batch"], strict=True))
        rate = len(rows) / seconds
        sys.stdout.write(f"| {name} | {seconds:.1f} | {rate:.1f} | {tokens / seconds:.0f} | {ratio:.2f} |\n")


if __name__ == "__main__":
    main()
