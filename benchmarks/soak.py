"""Mixed load on `kvgen serve` for a long time: are all answers right, is none lost, does memory stay within its bound?

    python benchmarks/soak.py [--seconds 3600] [--clients 4] [--max-cache-memory 400MB] [--threads N]

Clients send completions, conversations, batches of several choices, prompts with a shared beginning, formats, bad
requests and overlong prompts, whole or as streams, and some leave before the end. Each answer is compared with the text
of `kvgen.generate` for the same seed, computed beforehand. Prompts of clients that leave are new each time, so the
caches fill their bound. Exits with 1 if a request was lost or a text is wrong.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import socket
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from batch import NOUNS, prompts
from serving import MODEL, started

import kvgen
from kvgen.hub.names import resolve

TIMEOUT = 300.0  # seconds without a byte, after which a request counts as lost
EVERY = 10.0  # seconds between samples of memory
HEADERS = {"Content-Type": "application/json"}
SCHEMA = {"type": "object", "properties": {"name": {"enum": ["Paris", "Rome", "Oslo"]}}, "required": ["name"]}
BEGINNING = " ".join((Path(__file__).parent / "texts" / "quality.txt").read_text().split()[:250])
BAD: list[tuple[bytes, int]] = [
    (b'{"prompt": "x"', 400),
    (b"[1, 2]", 400),
    (b"[" * 5000, 400),
    (b'{"prompt": "x", "foo": 1}', 400),
    (b'{"prompt": "x", "temperature": "hot"}', 400),
    (b'{"prompt": "x", "temperature": NaN}', 400),
    (b'{"prompt": {"x": 1}}', 400),
    (b'{"prompt": [99999999]}', 400),
    (b'{"prompt": "x", "max_tokens": -1}', 400),
    (b'{"prompt": "x", "n": 100000}', 400),
    (b'{"prompt": "x", "regex": "["}', 400),
    (b'{"prompt": "x", "json_schema": {"type": "nothing"}}', 400),
    (b'{"prompt": "x", "model": "another"}', 404),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": "' + b"x" * 3_000_000 + b'"}', 413),
    (json.dumps({"prompt": [100] * 9000}).encode(), 400),
    (json.dumps({"prompt": "word " * 20_000}).encode(), 400),
]


@dataclass(frozen=True)
class Case:
    """A request and the texts of its choices."""

    kind: str
    path: str
    body: dict[str, Any]
    texts: list[str]


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (kind, body) of all requests whose answers are compared."""
    for number, prompt in enumerate(prompts(40)):
        yield "completion", {"prompt": prompt, "max_tokens": 4 + number % 30, "temperature": number % 3 / 2}
    for number, noun in enumerate(NOUNS):
        yield "shared beginning", {"prompt": f"{BEGINNING}\n\nThe {noun}", "max_tokens": 8, "temperature": number % 2}
        turns = [{"role": "user", "content": f"Name a {noun}."}]
        yield "conversation", {"messages": turns, "max_tokens": 16}
        turns = [*turns, {"role": "assistant", "content": "The old one."}, {"role": "user", "content": "And another?"}]
        yield "conversation", {"messages": turns, "max_tokens": 16}
    for number in range(6):
        texts = prompts(number % 3 + 1)
        yield "several choices", {"prompt": texts, "n": 2 + number % 2, "max_tokens": 10}
        yield "format", {"prompt": f"City {number}:", "regex": " [A-Z][a-z]{3,12}", "max_tokens": 12}
        yield "format", {"prompt": f"A city, number {number}: ", "json_schema": SCHEMA, "max_tokens": 24}
        yield "without cache", {"prompt": f"{number} apples and", "cache": False, "max_tokens": 6}


def cases(loaded: kvgen.Loaded) -> list[Case]:
    """Compute the texts of all requests, one after another."""
    made = []
    for seed, (kind, body) in enumerate(bodies()):
        body = {"temperature": 0.8, "seed": seed, **body}
        chat = "messages" in body
        given: Any = [loaded.tokenizer.encode_chat(body["messages"])] if chat else body["prompt"]
        constraint = None
        if "regex" in body:
            constraint = kvgen.Constraint("regex", body["regex"])
        elif "json_schema" in body:
            constraint = kvgen.Constraint("json-schema", json.dumps(body["json_schema"]))
        texts = [
            kvgen.generate(
                loaded,
                prompt,
                kvgen.Sampling(temperature=body["temperature"], seed=seed + choice),
                max_tokens=body["max_tokens"],
                constraint=constraint,
            )
            for prompt in ([given] if isinstance(given, str) else given)
            for choice in range(body.get("n", 1))
        ]
        made.append(Case(kind, "/v1/chat/completions" if chat else "/v1/completions", body, texts))
    return made


class LostError(Exception):
    """A request has no complete answer."""


class Client:
    """Sends requests one after another on one connection. counts: of each kind, by what became of it."""

    def __init__(self, address: str, made: list[Case], seed: int) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._address, self._cases, self._random, self._kind = address, made, random.Random(seed), ""
        self._connection = http.client.HTTPConnection(address, timeout=TIMEOUT)

    def run(self, end: float) -> None:
        """Send requests until `end`, in seconds of `time.monotonic`."""
        while time.monotonic() < end:
            try:
                outcome = self._one()
            except (OSError, http.client.HTTPException, ValueError, LostError) as error:
                outcome = "lost"
                tell(f"lost: {self._kind}: {error!r}")
                self._connection.close()
            self.counts[self._kind][outcome] += 1

    def _one(self) -> str:
        draw = self._random.random()
        if draw < 0.15:
            self._kind = "left by the client"
            self._connection.close()  # the server ends one that is idle for seconds
            self._leave()
            return "right"
        if draw < 0.3:
            self._kind = "refused"
            data, expected = self._random.choice(BAD)
            status, text = self._send("/v1/completions", data)
            right = status == expected and "error" in json.loads(text)
            return self._judged(right, f"{data[:60]!r}: {status} {text[:200]!r}")
        case, stream = self._random.choice(self._cases), self._random.random() < 0.5
        self._kind = f"{case.kind}, {'stream' if stream else 'whole'}"
        status, text = self._send(case.path, json.dumps({**case.body, "stream": stream}).encode())
        if status != 200:
            raise LostError(f"{status} {text[:200]!r}")
        found = (_streamed if stream else _whole)(text)
        return self._judged(found == case.texts, f"{case.body} {found} is not {case.texts}")

    def _judged(self, right: bool, what: str) -> str:
        if not right:
            tell(f"wrong: {self._kind}: {what}")
        return "right" if right else "wrong"

    def _send(self, path: str, data: bytes) -> tuple[int, str]:
        with suppress(BrokenPipeError, ConnectionResetError):  # the server may refuse a body that it has not read
            self._connection.request("POST", path, data, HEADERS)
        response = self._connection.getresponse()
        text = response.read().decode()
        if response.status == http.client.REQUEST_ENTITY_TOO_LARGE:
            self._connection.close()
        return response.status, text

    def _leave(self) -> None:
        """Ask for a long text after a new prompt, and leave at some point."""
        prompt = [self._random.randrange(20, 9000) for _ in range(self._random.randrange(4, 400))]
        body = {"prompt": prompt, "max_tokens": 500, "stream": self._random.random() < 0.7}
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT)
        connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
        if body["stream"] and self._random.random() < 0.8:
            response = connection.getresponse()
            for _ in range(self._random.randrange(1, 40)):
                response.readline()
        else:
            time.sleep(self._random.random())
        if self._random.random() < 0.5:  # a reset instead of a regular end
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sock.close()
        connection.close()


def _whole(text: str) -> list[str]:
    return [_text(choice) for choice in json.loads(text)["choices"]]


def _text(choice: dict[str, Any]) -> str:
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


def _streamed(text: str) -> list[str]:
    *events, last = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    texts, open_ = defaultdict[int, str](str), set[int]()
    for event in events:
        for choice in json.loads(event)["choices"]:
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            (open_.discard if choice["finish_reason"] else open_.add)(choice["index"])
    if last != "[DONE]" or open_:
        raise LostError(f"the stream ends with {last[:200]!r}, choices without end: {sorted(open_)}")
    return [texts[index] for index in sorted(texts)]


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def asked(address: str, path: str) -> str:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def metric(address: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", asked(address, "/metrics"), re.MULTILINE)
    assert found, name
    return float(found[1])


def watched(address: str, process: psutil.Process, end: float, clients: list[Client]) -> list[float]:
    """Return samples of the server's resident memory in MB until `end`, and tell of them once a minute."""
    samples, began = [], time.monotonic()
    while (now := time.monotonic()) < end:
        samples.append(process.memory_info().rss / 1e6)
        if len(samples) % 6 == 1:
            done = sum(sum(counts.values()) for client in clients for counts in list(client.counts.values()))
            kept = metric(address, "kvgen_kept_cache_bytes") / 1e6
            tell(f"{now - began:.0f} s: {done} requests, resident {samples[-1]:.0f} MB, kept caches {kept:.0f} MB")
        time.sleep(min(EVERY, max(0.0, end - now)))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--max-cache-memory", default="400MB")
    parser.add_argument("--threads", type=int, help="of the server")
    given = parser.parse_args()
    loaded = kvgen.load(resolve(MODEL))
    made = cases(loaded)
    del loaded
    tell(f"{len(made)} requests with known texts")
    command = [sys.executable, "-m", "kvgen", "serve", "-m", str(resolve(MODEL)), "--port", "0", "--max-body", "2MB"]
    command += ["--max-cache-memory", given.max_cache_memory]
    command += ["--threads", str(given.threads)] if given.threads else []
    with started(command, r"^serving .* on http://(\S+)/v1") as server, ThreadPoolExecutor(given.clients) as pool:
        address, process = server
        end = time.monotonic() + given.seconds
        clients = [Client(address, made, seed) for seed in range(given.clients)]
        running = [pool.submit(client.run, end) for client in clients]
        samples = watched(address, process, end, clients)
        for one in running:
            one.result()
        deadline = time.monotonic() + TIMEOUT
        while metric(address, "kvgen_requests_running") and time.monotonic() < deadline:
            time.sleep(1)
        left = int(metric(address, "kvgen_requests_running") + metric(address, "kvgen_requests_waiting"))
        last, kept = process.memory_info().rss / 1e6, metric(address, "kvgen_kept_cache_bytes") / 1e6
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for client in clients:
        for kind, found in client.counts.items():
            counts[kind] += found
    total = sum(counts.values(), Counter[str]())
    lines = ["| requests | right | lost | wrong |", "|---|---:|---:|---:|"]
    for kind, found in [*sorted(counts.items()), ("all", total)]:
        lines.append(f"| {kind} | {found['right']} | {found['lost']} | {found['wrong']} |")
    sizes = (samples[0], samples[len(samples) // 6], max([*samples, last]), last)
    shown = "{:.0f} MB at the start, {:.0f} MB after a sixth of the time, {:.0f} MB at most, {:.0f} MB at the end"
    lines += ["", f"resident memory: {shown.format(*sizes)}"]
    lines += [f"kept caches at the end: {kept:.0f} MB of {given.max_cache_memory}; rows left: {left}", ""]
    sys.stdout.write("\n".join(lines))
    raise SystemExit(bool(total["lost"] or total["wrong"] or left))


if __name__ == "__main__":
    main()
