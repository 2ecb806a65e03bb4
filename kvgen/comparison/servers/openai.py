"""Any server with the completions of OpenAI's API: text in, log-probabilities out.

Nothing in this API turns a cache off. A server that gives log-probabilities of the prompt (`echo`) computes all of it
for them; of another one only the first request of a text is computed without the cache.
Source: the API reference of OpenAI, and mlx_lm/server.py, whose form of log-probabilities differs.
"""

from __future__ import annotations

import uuid
from typing import Any

from kvgen.comparison.servers.client import AbsentError, Client
from kvgen.comparison.servers.server import (
    Answer,
    Prompt,
    Server,
    first_model,
    pieces,
    read_logprobs,
    read_usage,
    timed,
)
from kvgen.comparison.servers.texts import compose
from kvgen.errors import UnsupportedError

_PATH = "/v1/completions"
_TOP = 5  # the API's limit
_FEW = 8  # words, to find out what a server can do


class OpenAIServer:
    kind = "openai"

    def __init__(self, client: Client, model: str) -> None:
        self._client, self.model = client, model
        self.context: int | None = None
        self._logprobs: dict[str, Any] = {"logprobs": _TOP}
        self.repeats = self._echoes()

    @classmethod
    def detect(cls, client: Client) -> Server | None:
        try:
            return cls(client, str(first_model(client).get("id", "")))
        except AbsentError:
            return None

    def encode(self, text: str) -> Prompt:
        return pieces(text)

    def ask(self, prompt: Prompt, steps: int, space: str | None) -> Answer:
        return self._ask(prompt, steps, echo=self.repeats and space is None)

    def _echoes(self) -> bool:
        """Whether the server gives log-probabilities of a prompt, and without its cache."""
        text = pieces(compose(_FEW, uuid.uuid4().int))
        try:
            self._ask(text, 1, echo=False)
            return not self._ask(text, 1, echo=True).reused
        except UnsupportedError:
            return False

    def _ask(self, prompt: Prompt, steps: int, *, echo: bool) -> Answer:
        body = {
            **({"model": self.model} if self.model else {}),
            "prompt": "".join(str(piece) for piece in prompt),
            "max_tokens": steps,
            "temperature": 0,
            **({"echo": True} if echo else {}),
        }
        answer, seconds = self._send(body)
        with self._client.parsing(_PATH):
            logprobs, usage = answer["choices"][0].get("logprobs"), answer.get("usage") or {}
            if echo:
                logprobs = _generated(logprobs, int(usage.get("completion_tokens", steps)))
            found, _ = read_logprobs(logprobs)
            tokens = tuple(max(step, key=step.__getitem__) for step in found)  # mlx-lm 0.32 names others of the top
            return Answer(found, tokens, *read_usage(usage), seconds)

    def _send(self, body: dict[str, Any]) -> tuple[Any, float]:
        try:
            return timed(self._client, _PATH, body | self._logprobs)
        except UnsupportedError:
            if "top_logprobs" in self._logprobs:
                raise
        self._logprobs = {"logprobs": True, "top_logprobs": _TOP}  # as in chats: mlx-lm
        return timed(self._client, _PATH, body | self._logprobs)


def _generated(logprobs: Any, count: int) -> dict[str, Any]:
    """The part of log-probabilities that follows the prompt. Raises UnsupportedError if the prompt has none."""
    first = len((logprobs or {}).get("tokens") or ()) - count
    if first <= 0:
        raise UnsupportedError("the server gives no log-probabilities of prompts")
    return {name: logprobs[name][first:] for name in ("tokens", "top_logprobs")}
