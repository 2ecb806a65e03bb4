"""SGLang's own API. An `extra_key` of its own keeps a request from what others cached.

Where `cached_tokens` says that a request read the cache all the same, as in versions without that field, the cache is
flushed, and the request made again for the log-probabilities of its whole prompt, which need all of it.

Source: python/sglang/srt/managers/io_struct.py and entrypoints/http_server.py of SGLang.
"""

from __future__ import annotations

import uuid
from typing import Any

from kvgen.comparison.servers.server import (
    Answer,
    NoLogprobsError,
    OwnedServer,
    Prompt,
    Step,
    Token,
    timed,
)

_PATH = "/generate"
_TOP = 20
_COUNTS = ("cached_tokens", "prompt_tokens")


class SglangServer(OwnedServer):
    kind = "sglang"

    def ask(self, prompt: Prompt, steps: int, space: str | None) -> Answer:
        answer = self._ask(prompt, steps, space or uuid.uuid4().hex, -1)
        if space is None and answer.reused:
            self._client.text("/flush_cache", "POST")
            answer = self._ask(prompt, steps, uuid.uuid4().hex, 0)
        return answer

    def _ask(self, prompt: Prompt, steps: int, space: str, start: int) -> Answer:
        body = {
            "input_ids": list(prompt),
            "extra_key": space,
            "sampling_params": {"max_new_tokens": steps, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": _TOP,
            "logprob_start_len": start,
        }
        answer, seconds = timed(self._client, _PATH, body)
        with self._client.parsing(_PATH):
            about = answer["meta_info"]
            if not about.get("output_top_logprobs"):
                raise NoLogprobsError
            steps_ = tuple(_step(top) for top in about["output_top_logprobs"])
            tokens: tuple[Token, ...] = tuple(int(one[1]) for one in about["output_token_logprobs"])
            reused, length = (None if (n := about.get(name)) is None else int(n) for name in _COUNTS)
            return Answer(steps_, tokens, reused, length, seconds)


def _step(top: list[Any]) -> Step:
    return {int(id_): float(value) for value, id_, *_ in top}
