"""Requests a second and latencies of servers under load: kvgen's, llama.cpp's, beside `kvgen batch` on the same rows.

    python benchmarks/serving.py [--requests 1000] [--peer-requests N] [--clients 64] [--tokens 32] [--runs 3] [--whole]

In turn, with the default model, greedily; medians. Clients stream, unless `--whole`. llama.cpp's own server, with as
many slots, is left out where xllamacpp is not installed; `--peer-requests` gives it fewer. Nothing else may run on the
machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from threading import Thread, local

from batch import in_a_batch, prompts

import kvgen
from kvgen.hub.names import resolve

MODEL = "smollm2"
LLAMA_CPP = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_parallel = sys.argv[1], int(sys.argv[2])
parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 128 * int(sys.argv[2]), 2048, 512
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(parameters)
print("serving on", server.listening_address, flush=True)
time.sleep(1 << 30)
"""


@dataclass
class Load:
    """One run. tokens: of all completions. first, between: seconds to the first token and between tokens."""

    requests: int
    seconds: float
    tokens: int
    first: list[float]
    between: list[float]


@contextmanager
def started(command: list[str], pattern: str) -> Iterator[str]:
    """Run a server until the block ends; yields the host and port that it prints."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout or ():
            if found := re.search(pattern, line):
                break
        else:
            raise SystemExit(f"{command[0]} ended")
        Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()  # so that it never waits
        yield found[1]
    finally:
        process.kill()
        process.wait()


def loaded_by(address: str, texts: list[str], tokens: int, clients: int, *, stream: bool) -> Load:
    """Let clients send the texts, each the next one when its last is complete."""
    connections = local()

    def ask(text: str) -> tuple[int, list[float]]:
        if not hasattr(connections, "one"):
            connections.one = http.client.HTTPConnection(address, timeout=600)
        body = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": stream}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        times = [time.perf_counter()]
        data, headers = json.dumps(body), {"Content-Type": "application/json"}
        try:
            connections.one.request("POST", "/v1/completions", data, headers)
            response = connections.one.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):  # llama.cpp's server ends connections after a while
            connections.one = http.client.HTTPConnection(address, timeout=600)
            connections.one.request("POST", "/v1/completions", data, headers)
            response = connections.one.getresponse()
        assert response.status == 200, response.read()
        if not stream:
            usage = json.loads(response.read())["usage"]
            return usage["completion_tokens"], times
        usage = {}
        while line := response.readline():
            if line.startswith(b"data: {"):
                data = json.loads(line[6:])
                usage = data.get("usage") or usage
                if data["choices"]:
                    times.append(time.perf_counter())
        return usage["completion_tokens"], times

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(ask, texts))
    seconds = time.perf_counter() - began
    first = [times[1] - times[0] for _, times in results if len(times) > 1]
    between = [b - a for _, times in results for a, b in pairwise(times[1:])]
    return Load(len(texts), seconds, sum(tokens for tokens, _ in results), first, between)


def described(name: str, loads: list[Load]) -> str:
    rate = statistics.median(load.tokens / load.seconds for load in loads)
    parts = [f"{name:<22}{loads[0].requests:5} requests{rate:8.1f} tokens/s"]
    for what in ("first", "between"):
        if seconds := sorted(second for load in loads for second in getattr(load, what)):
            p50, p99 = (1000 * seconds[int(part * (len(seconds) - 1))] for part in (0.5, 0.99))
            parts.append(f"{what} p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    return "   ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("requests", 1000), ("clients", 64), ("tokens", 32), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peer-requests", type=int, help="requests to llama.cpp's server, by default as many")
    parser.add_argument("--whole", action="store_true", help="answers at once instead of streams")
    given = parser.parse_args()
    texts, path = prompts(given.requests), str(resolve(MODEL))
    servers = {
        "kvgen serve": (
            [sys.executable, "-m", "kvgen", "serve", "-m", path, "--port", "0", "--batch-size", str(given.clients)],
            r"^serving .* on http://(\S+)/v1",
        )
    }
    if find_spec("xllamacpp"):
        threads = str(os.cpu_count())
        command = [sys.executable, "-c", LLAMA_CPP, path, str(given.clients), threads]
        servers["llama.cpp's server"] = (command, r"^serving on http://(\S+?)/?$")
    results: dict[str, list[Load]] = {}
    for _ in range(given.runs):
        for name, (command, pattern) in servers.items():
            with started(command, pattern) as address:
                loaded_by(address, texts[:8], 4, 8, stream=False)
                sent = texts if name == "kvgen serve" else texts[: given.peer_requests]
                load = loaded_by(address, sent, given.tokens, given.clients, stream=not given.whole)
            results.setdefault(name, []).append(load)
            sys.stderr.write(f"{described(name, [load])}\n")
        loaded = kvgen.load(Path(path))
        rows = [loaded.tokenizer.encode(text) for text in texts]
        in_a_batch(loaded, rows[:8], 4)
        began = time.perf_counter()
        found = in_a_batch(loaded, rows, given.tokens)
        load = Load(len(rows), time.perf_counter() - began, sum(map(len, found)), [], [])
        results.setdefault("kvgen batch", []).append(load)
        sys.stderr.write(f"{described('kvgen batch', [load])}\n")
        del loaded
    for name, loads in results.items():
        sys.stdout.write(f"{described(name, loads)}\n")


if __name__ == "__main__":
    main()
