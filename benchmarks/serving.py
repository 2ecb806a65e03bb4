"""Requests a second and latencies of servers under load: kvgen's, llama.cpp's, beside `kvgen batch` on the same rows.

    python benchmarks/serving.py [--requests 1000] [--peer-requests N] [--clients 64] [--tokens 32] [--runs 3] [--whole]

In turn, with the default model, greedily; medians. Clients stream, unless `--whole`. llama.cpp's own server, with as
many slots, is left out where xllamacpp is not installed; `--peer-requests` gives it fewer. Nothing else may run on the
machine.

The clients are one thread that reads all connections as bytes arrive and counts events without decoding them: about
0.02 s of CPU time for 1,000 streamed tokens, beside the 3 s of the server. They share the machine with it, so their
CPU time is part of what a server seems to lose against `kvgen batch`. It is printed, as is that of the servers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from threading import Thread

import psutil
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
print("\\nserving on", server.listening_address, flush=True)  # what it logs may have left a line open
time.sleep(1 << 30)
"""


@dataclass
class Load:
    """One run. tokens: of all completions. first, between: seconds to the first token and between tokens.

    cpu, clients_cpu: seconds of CPU time of the process that computes, and of all clients.
    """

    requests: int
    seconds: float
    tokens: int
    cpu: float
    clients_cpu: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


@contextmanager
def started(command: list[str], pattern: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server until the block ends; yields the host and port that it prints, and its process."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout or ():
            if found := re.search(pattern, line):
                break
        else:
            raise SystemExit(f"{command[0]} ended")
        Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()  # so that it never waits
        yield found[1], psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


class Client:
    """One connection, with one request at a time. times: of the request, and of each event of the answer's stream."""

    def __init__(self, address: str, selector: selectors.BaseSelector) -> None:
        host, port = address.rsplit(":", 1)
        self._address, self._selector = (host, int(port)), selector
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.create_connection(self._address, timeout=600)
        self._selector.register(self._socket, selectors.EVENT_READ, self)

    def close(self) -> None:
        self._selector.unregister(self._socket)
        self._socket.close()

    def ask(self, body: bytes) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self._address[0]}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self._start, self._last, self._rest = b"", b"", b""
        self.times = [time.perf_counter()]
        self._socket.sendall(self._request)

    def read(self) -> bool:
        """Take what has arrived; return whether the answer is complete."""
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:  # llama.cpp's server ends connections after a while
            assert not self._start, "the server left"
            self.close()
            self._connect()
            self._socket.sendall(self._request)
            return False
        if not self._start:
            self._start = data
            assert data.startswith(b"HTTP/1.1 200 "), data
        *events, self._rest = (self._rest + data).split(b"\n\n")
        if events := [event for event in events if b"data: {" in event]:
            self._last = events[-1]
            self.times += [time.perf_counter()] * len(events)
        if length := re.search(rb"\r\ncontent-length: (\d+)\r\n", self._start, re.IGNORECASE):
            _, _, self._last = self._rest.partition(b"\r\n\r\n")
            return len(self._last) == int(length[1])
        return self._rest.endswith(b"\r\n0\r\n\r\n")  # the last chunk: JSON has no line ends

    def tokens(self) -> int:
        """The number of tokens of a complete answer, which its last event has."""
        last = json.loads(self._last[self._last.index(b"{") : self._last.rindex(b"}") + 1])
        if not last["choices"]:  # it came behind the tokens
            self.times.pop()
        return int(last["usage"]["completion_tokens"])


def loaded_by(
    address: str, process: psutil.Process, texts: list[str], tokens: int, clients: int, *, stream: bool
) -> Load:
    """Let clients send the texts, each the next one when its last is complete."""
    settings = {"max_tokens": tokens, "temperature": 0, "stream": stream}
    settings |= {"stream_options": {"include_usage": True}} if stream else {}
    bodies = iter([json.dumps({"prompt": text, **settings}).encode() for text in texts])
    began, cpu, clients_cpu = time.perf_counter(), sum(process.cpu_times()[:2]), time.process_time()
    load = Load(len(texts), 0.0, 0, 0.0)
    with selectors.DefaultSelector() as selector:
        for _, body in zip(range(clients), bodies, strict=False):
            Client(address, selector).ask(body)
        while selector.get_map():
            for key, _ in selector.select():
                client = key.data
                if not client.read():
                    continue
                load.tokens += client.tokens()
                load.first += [b - a for a, b in pairwise(client.times[:2])]
                load.between += [b - a for a, b in pairwise(client.times[1:])]
                if (body := next(bodies, None)) is None:
                    client.close()
                else:
                    client.ask(body)
    load.seconds, load.cpu = time.perf_counter() - began, sum(process.cpu_times()[:2]) - cpu
    load.clients_cpu = time.process_time() - clients_cpu
    return load


def batch_of(path: Path, texts: list[str], tokens: int) -> Load:
    """Complete the same texts in this process."""
    loaded = kvgen.load(path)
    rows = [loaded.tokenizer.encode(text) for text in texts]
    in_a_batch(loaded, rows[:8], 4)
    began, cpu = time.perf_counter(), time.process_time()
    found = in_a_batch(loaded, rows, tokens)
    return Load(len(rows), time.perf_counter() - began, sum(map(len, found)), time.process_time() - cpu)


def described(name: str, loads: list[Load]) -> str:
    rate = statistics.median(load.tokens / load.seconds for load in loads)
    parts = [f"{name:<22}{loads[0].requests:5} requests{rate:8.1f} tokens/s"]
    for what in ("first", "between"):
        if seconds := sorted(second for load in loads for second in getattr(load, what)):
            p50, p99 = (1000 * seconds[int(part * (len(seconds) - 1))] for part in (0.5, 0.99))
            parts.append(f"{what} p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    cpu, clients = (
        statistics.median(1000 * getattr(load, what) / load.tokens for load in loads) for what in ("cpu", "clients_cpu")
    )
    parts.append(f"CPU for 1,000 tokens {cpu:.2f} s" + (f" + {clients:.3f} s of the clients" if clients else ""))
    return "   ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("requests", 1000), ("clients", 64), ("tokens", 32), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peer-requests", type=int, help="requests to llama.cpp's server, by default as many")
    parser.add_argument("--whole", action="store_true", help="answers at once instead of streams")
    given = parser.parse_args()
    texts, path = prompts(given.requests), resolve(MODEL)
    command = [sys.executable, "-m", "kvgen", "serve", "-m", str(path), "--port", "0"]
    command += ["--batch-size", str(given.clients)]
    servers = {"kvgen serve": (command, r"^serving .* on http://(\S+)/v1")}
    if find_spec("xllamacpp"):
        threads = str(os.cpu_count())
        command = [sys.executable, "-c", LLAMA_CPP, str(path), str(given.clients), threads]
        servers["llama.cpp's server"] = (command, r"^serving on http://(\S+?)/?$")
    results: dict[str, list[Load]] = {name: [] for name in (*servers, "kvgen batch")}
    for number in range(given.runs):
        for name in list(results)[:: 1 if number % 2 else -1]:  # there and back, so that the machine's drift hits all
            if name in servers:
                sent = texts if name == "kvgen serve" else texts[: given.peer_requests]
                with started(*servers[name]) as server:
                    loaded_by(*server, texts[:8], 4, 8, stream=False)
                    load = loaded_by(*server, sent, given.tokens, given.clients, stream=not given.whole)
            else:
                load = batch_of(path, texts, given.tokens)
            results[name].append(load)
            sys.stderr.write(f"{described(name, [load])}\n")
    for name, loads in results.items():
        sys.stdout.write(f"{described(name, loads)}\n")
    pairs = zip(results["kvgen serve"], results["kvgen batch"], strict=True)
    ratios = [one.tokens / one.seconds / (two.tokens / two.seconds) for one, two in pairs]
    sys.stdout.write(f"kvgen serve / kvgen batch, run by run: {', '.join(f'{ratio:.2f}' for ratio in ratios)}\n")


if __name__ == "__main__":
    main()
