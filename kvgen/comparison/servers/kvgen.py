"""kvgen's own server. `cache: false` computes a request without the cache; answers count what was reused."""

from __future__ import annotations

from typing import Any

from kvgen.comparison.servers.client import Client
from kvgen.comparison.servers.server import (
    Answer,
    Prompt,
    Server,
    model_owned_by,
    read_logprobs,
    read_usage,
    timed,
    tokenized,
)

_PATH = "/v1/completions"
_TOP = 20  # the server's limit


class KvgenServer:
    kind = "kvgen"
    repeats = True

    def __init__(self, client: Client, model: dict[str, Any]) -> None:
        self._client = client
        with client.parsing("/v1/models"):
            self.model, self.context = str(model["id"]), model["context_length"]

    @classmethod
    def detect(cls, client: Client) -> Server | None:
        model = model_owned_by(client, cls.kind)
        return None if model is None else cls(client, model)

    def encode(self, text: str) -> Prompt:
        return tokenized(self._client, {"prompt": text})

    def ask(self, prompt: Prompt, steps: int, space: str | None) -> Answer:
        body = {
            "prompt": list(prompt),
            "max_tokens": steps,
            "temperature": 0,
            "logprobs": _TOP,
            "return_tokens_as_token_ids": True,
            "cache": space is not None,
        }
        answer, seconds = timed(self._client, _PATH, body)
        with self._client.parsing(_PATH):
            found, tokens = read_logprobs(answer["choices"][0]["logprobs"])
            return Answer(found, tokens, *read_usage(answer["usage"]), seconds)
