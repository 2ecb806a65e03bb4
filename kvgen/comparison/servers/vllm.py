"""vLLM. A `cache_salt` of its own keeps a request from what others cached; requests of one salt share.

Reused positions are in `usage` if the server runs with `--enable-prompt-tokens-details`, else in its metrics.
Source: vllm/entrypoints/openai/completion/protocol.py of vLLM 0.32.
"""

from __future__ import annotations

import re
import threading
import uuid
from dataclasses import replace
from typing import Any

from kvgen.comparison.servers.client import AbsentError, Client
from kvgen.comparison.servers.server import (
    Answer,
    OwnedServer,
    Prompt,
    read_logprobs,
    read_usage,
    timed,
)

_PATH = "/v1/completions"
_TOP = 20  # the server's default limit, --max-logprobs
_HITS = re.compile(r"^vllm:(?:gpu_)?prefix_cache_hits(?:_total)?(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class VllmServer(OwnedServer):
    kind = "vllm"

    def __init__(self, client: Client, model: dict[str, Any]) -> None:
        super().__init__(client, model)
        self._lock = threading.Lock()
        self._running = self._started = 0
        self._in_usage: bool | None = None  # unknown before the first answer

    def ask(self, prompt: Prompt, steps: int, space: str | None) -> Answer:
        if self._in_usage is not False:
            answer = self._ask(prompt, steps, space)
            self._in_usage = answer.reused is not None
            if self._in_usage:
                return answer
        with self._lock:
            self._running += 1
            self._started += 1
            started, alone = self._started, self._running == 1
        try:
            before = self._hits()
            answer, after = self._ask(prompt, steps, space), self._hits()
        finally:
            with self._lock:
                self._running -= 1
        if before is None or after is None or not alone or started != self._started:
            return answer  # the metrics count requests beside this one too
        return replace(answer, reused=after - before)

    def _hits(self) -> int | None:
        """Positions found in the cache since the server started."""
        try:
            found = _HITS.findall(self._client.text("/metrics"))
        except AbsentError:
            return None
        with self._client.parsing("/metrics"):
            return int(sum(float(count) for count in found)) if found else None

    def _ask(self, prompt: Prompt, steps: int, space: str | None) -> Answer:
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": steps,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": _TOP,
            "return_tokens_as_token_ids": True,
            "cache_salt": space or uuid.uuid4().hex,
        }
        answer, seconds = timed(self._client, _PATH, body)
        with self._client.parsing(_PATH):
            found, tokens = read_logprobs(answer["choices"][0]["logprobs"])
            return Answer(found, tokens, *read_usage(answer.get("usage")), seconds)
