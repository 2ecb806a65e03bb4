"""kvgen's own server. `cache: false` computes a request without the cache; answers count what was reused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvgen.comparison.servers.server import (
    Answer,
    OwnedServer,
    Prompt,
    read_logprobs,
    read_usage,
    timed,
)

_PATH = "/v1/completions"
_TOP = 20  # the server's limit


class KvgenServer(OwnedServer):
    kind = "kvgen"

    @staticmethod
    def _context(model: Mapping[str, Any]) -> int | None:
        length: int | None = model["context_length"]
        return length

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
