"""A small server on localhost that speaks the dialects of several kinds, and that may be told to get its cache wrong.

The model is one layer of attention with a linear bias on distance (ALiBi), in float64: keys and values depend on their
own token alone, and a text without its first tokens is the same text at other positions, as with rotary embeddings.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

VOCAB, WIDTH = 256, 24
DECAY = 0.02  # of attention, by position
WINDOW, CHUNK, SHORT = 150, 64, 40  # of the faults
_LONG = 1000  # positions of a text that takes time
_GATHER = 0.02  # seconds to wait for another request to compute beside

FAULTS = {
    "another state": "another request's state",
    "newest dropped": "newest token missing",
    "oldest dropped": "beginning lost",
    "quantized": "small difference",
    "window": "beginning lost",
    "claimed hits": "claimed hits",
    "leak": "another request's tokens",
    "stale edit": "stale state",
    "position off by one": "",
    "chunk lost": "chunk boundary",
    "short hits": "below a length",
}
"""Faults of the server, each with the cause that should be found; "" if none can be."""


@dataclass
class Toy:
    """A model with a cache of all prompts. noise: of each logit, by what is computed at the same time."""

    fault: str = ""
    noise: float = 0.0
    seed: int = 0
    block: int = 1
    keeps: bool = False  # prompts that begin alike, instead of the last of them
    slow: int = 0  # matrix products for each computed position of a long text
    stored: list[tuple[str, list[int]]] = field(default_factory=list)
    running: list[list[int]] = field(default_factory=list)
    lock: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        source = np.random.default_rng(self.seed)
        self.embed, self.query, self.key, self.value = (
            source.normal(size=shape) / WIDTH**0.5
            for shape in ((VOCAB, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH))
        )
        self.embed *= 4
        self.head = source.normal(size=(WIDTH, VOCAB)) * 2

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text: those that the server writes itself are `w17` and so on."""
        words = (word.removeprefix("w") for word in text.split(" "))
        return [int(word) % VOCAB if word.isdecimal() else zlib.crc32(word.encode()) % VOCAB for word in words]

    def complete(self, ids: list[int], steps: int, top: int, space: str | None) -> tuple[list[dict[int, float]], int]:
        """Log-probabilities of each step, and the number of positions said to be reused."""
        with self.lock:
            self.running.append(ids)
            self.lock.notify_all()
            if self.fault == "leak":
                self.lock.wait_for(lambda: len(self.running) > 1, timeout=_GATHER)
            found = max(
                (_shared(ids, other) for place, other in self.stored if space is not None and place == space), default=0
            )
            reused = min(found, len(ids) - 1) // self.block * self.block
        try:
            return self._generate(ids, steps, top, reused, space)
        finally:
            with self.lock:
                self.running.remove(ids)

    def _generate(
        self, ids: list[int], steps: int, top: int, reused: int, space: str | None
    ) -> tuple[list[dict[int, float]], int]:
        keys, values, further = self._rows(ids, reused, space)
        query = self.embed[ids[-1]]
        text, answer = list(ids), []
        for step in range(steps):
            logits = self._logits(query, keys, values, further, len(ids) - reused if step == 0 else 1, text)
            log = logits - np.logaddexp.reduce(logits)
            best = np.argsort(-log)[:top]
            answer.append({int(token): float(log[token]) for token in best})
            text.append(int(best[0]))
            query = self.embed[text[-1]]
            keys, values = np.vstack([keys, query @ self.key]), np.vstack([values, query @ self.value])
        with self.lock:
            like = [one for one in self.stored if one[0] == space and _shared(one[1], text) > len(text) // 8]
            if not self.keeps:
                self.stored = [one for one in self.stored if one not in like]  # as a slot is overwritten
            self.stored.append((space or f"none {len(self.stored)}", text[:-1]))
        return answer, reused

    def _rows(self, ids: list[int], reused: int, space: str | None) -> tuple[Any, Any, int]:
        """Keys, values, and how much further away those of the first `reused` positions are, which may be wrong."""
        cached = reused and self.fault != "claimed hits"
        for _ in range(0 if cached or len(ids) < _LONG else self.slow):
            for _ in ids:
                self.embed @ self.key
        rows = np.array(self.embed[ids])
        keys, values = rows @ self.key, rows @ self.value
        if not reused:
            return keys, values, 0
        if self.fault == "another state":
            other = next((text for place, text in self.stored if not _shared(ids, text)), ids)
            other = (other * (1 + reused // len(other)))[:reused]
            keys[:reused], values[:reused] = self.embed[other] @ self.key, self.embed[other] @ self.value
        elif self.fault == "newest dropped":
            keys, values = np.delete(keys, reused - 1, 0), np.delete(values, reused - 1, 0)
        elif self.fault == "oldest dropped":
            keys, values = keys[1:], values[1:]
        elif self.fault == "quantized":
            scale = np.abs(values[:reused]).max() / 127
            values[:reused] = np.round(values[:reused] / scale) * scale
        elif self.fault == "window" and len(ids) > WINDOW:
            keys, values = keys[-WINDOW:], values[-WINDOW:]
        elif self.fault == "stale edit" and reused < len(ids) - 1:
            old = [text for place, text in self.stored if place == space and _shared(ids, text) == reused]
            changed = old[-1][reused : len(ids) - 1] if old else []
            keys[reused : reused + len(changed)] = self.embed[changed] @ self.key
            values[reused : reused + len(changed)] = self.embed[changed] @ self.value
        elif self.fault == "chunk lost" and reused % CHUNK == 0:
            keys, values = keys[: reused - 8], values[: reused - 8]
            keys = np.vstack([keys, rows[reused:] @ self.key])
            values = np.vstack([values, rows[reused:] @ self.value])
        elif self.fault == "short hits" and reused < SHORT:
            values[:reused] *= 0.5
        return keys, values, reused if self.fault == "position off by one" else 0

    def _logits(self, query: Any, keys: Any, values: Any, further: int, computed: int, text: list[int]) -> Any:
        """Logits after `text`. further: number of first positions that are taken for one position earlier."""
        distance = np.arange(len(keys))[::-1] + (np.arange(len(keys)) < further)
        scores = keys @ (query @ self.query) - DECAY * distance
        weights = np.exp(scores - scores.max())
        mixed = (weights / weights.sum()) @ values
        with self.lock:
            beside = [other for other in self.running if other[:1] != text[:1]]
        if self.fault == "leak" and beside:
            mixed = mixed + 0.3 * self.embed[beside[0][-1]] @ self.value
        logits = (np.tanh(mixed + query / 4)) @ self.head
        if self.noise:
            number = zlib.crc32(json.dumps([self.seed, computed, len(beside), text]).encode())
            logits = logits + np.random.default_rng(number).normal(size=VOCAB) * self.noise
        return logits


def _shared(a: list[int], b: list[int]) -> int:
    return next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def answer(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
    """The answer of a server of this kind to a request; None if it has no such path."""
    owned = {"data": [{"id": "toy", "owned_by": kind, "max_model_len": 4096}]}
    if path == "/v1/models" and kind != "llama.cpp":
        return owned
    if path == "/tokenize" and kind != "openai":
        return {"tokens": toy.encode(body.get("content") or body["prompt"])}
    if kind == "llama.cpp" and path == "/props":
        return {"default_generation_settings": {"n_ctx": 4096}, "model_path": "toy", "total_slots": 4}
    if kind == "llama.cpp" and path == "/completion":
        space = "all" if body["cache_prompt"] else None
        steps, reused = toy.complete(body["prompt"], body["n_predict"], body["n_probs"], space)
        count = len(body["prompt"])
        timings = {"cache_n": reused, "prompt_n": count - reused}
        return {"completion_probabilities": _content(steps), "timings": timings, "tokens_evaluated": count}
    if kind == "sglang" and path == "/generate":
        settings, space = body["sampling_params"], None if body["logprob_start_len"] == 0 else body["extra_key"]
        steps, reused = toy.complete(body["input_ids"], settings["max_new_tokens"], body["top_logprobs_num"], space)
        tops = [[[value, token, None] for token, value in step.items()] for step in steps]
        about = {"output_top_logprobs": tops, "output_token_logprobs": [top[0] for top in tops]}
        return {"meta_info": {**about, "cached_tokens": reused, "prompt_tokens": len(body["input_ids"])}}
    if kind in ("vllm", "openai") and path == "/v1/completions":
        ids = body["prompt"] if kind == "vllm" else toy.encode(body["prompt"])
        steps, reused = toy.complete(ids, body["max_tokens"], body["logprobs"], body.get("cache_salt", "all"))
        named = [{_name(kind, token): value for token, value in step.items()} for step in steps]
        logprobs = {"tokens": [next(iter(step)) for step in named], "top_logprobs": named}
        usage = {"prompt_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": reused}}
        return {"choices": [{"logprobs": logprobs}], "usage": usage}
    return None


def _name(kind: str, token: int) -> str:
    return f"token_id:{token}" if kind == "vllm" else f" w{token}"


def _content(steps: list[dict[int, float]]) -> list[dict[str, Any]]:
    tops = [[{"id": token, "logprob": value} for token, value in step.items()] for step in steps]
    return [{**top[0], "top_logprobs": top} for top in tops]


@contextmanager
def serving(toy: Toy, kind: str = "llama.cpp", reply: Any = answer) -> Iterator[str]:
    """Serve on a free port of localhost; yields the address. reply: what answers, as `answer` does."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet for an answer
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            self._respond(json.loads(self.rfile.read(length) or b"{}"))

        def _respond(self, body: dict[str, Any]) -> None:
            found = reply(toy, kind, self.path, body)
            if not isinstance(found, tuple):
                found = 200 if found else 404, json.dumps(found).encode()
            status, data, *headers = found
            self.send_response(status)
            for header in headers:
                self.send_header(*header)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
