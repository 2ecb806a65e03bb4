"""Any server with the completions of OpenAI's API: text in, log-probabilities out.

Nothing in this API turns a cache off, so only the first request of a text is computed without it.
Source: the API reference of OpenAI, and mlx_lm/server.py, whose form of log-probabilities differs.
"""

from __future__ import annotations

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
from kvgen.errors import UnsupportedError

_PATH = "/v1/completions"
_TOP = 5  # the API's limit


class OpenAIServer:
    kind = "openai"
    repeats = False

    def __init__(self, client: Client, model: str) -> None:
        self._client, self.model = client, model
        self.context: int | None = None
        self._logprobs: dict[str, Any] = {"logprobs": _TOP}

    @classmethod
    def detect(cls, client: Client) -> Server | None:
        try:
            return cls(client, str(first_model(client).get("id", "")))
        except AbsentError:
            return None

    def encode(self, text: str) -> Prompt:
        return pieces(text)

    def ask(self, prompt: Prompt, steps: int, space: str | None) -> Answer:
        body = {
            **({"model": self.model} if self.model else {}),
            "prompt": "".join(str(piece) for piece in prompt),
            "max_tokens": steps,
            "temperature": 0,
        }
        try:
            answer, seconds = timed(self._client, _PATH, body | self._logprobs)
        except UnsupportedError:
            if "top_logprobs" in self._logprobs:
                raise
            self._logprobs = {"logprobs": True, "top_logprobs": _TOP}  # as in chats: mlx-lm
            answer, seconds = timed(self._client, _PATH, body | self._logprobs)
        with self._client.parsing(_PATH):
            found, _ = read_logprobs(answer["choices"][0].get("logprobs"))
            tokens = tuple(max(step, key=step.__getitem__) for step in found)  # mlx-lm 0.32 names others of the top
            return Answer(found, tokens, *read_usage(answer.get("usage")), seconds)
