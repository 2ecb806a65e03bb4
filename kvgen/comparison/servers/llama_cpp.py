"""The server of llama.cpp. `cache_prompt` says whether a request reads the cache; `timings.cache_n` how much it did.

Source: tools/server/README.md and server-context.cpp of the project.
"""

from __future__ import annotations

from kvgen.comparison.servers.client import AbsentError, Client, NotJsonError
from kvgen.comparison.servers.server import Answer, Prompt, Server, read_content, timed, tokenized
from kvgen.errors import UnsupportedError

_PATH = "/completion"
_TOP = 20


class LlamaCppServer:
    kind = "llama.cpp"
    repeats = True

    def __init__(self, client: Client) -> None:
        self._client = client
        props = client.get("/props")
        with client.parsing("/props"):
            self.model = str(props.get("model_alias") or props["model_path"])
            self.context: int | None = int(props["default_generation_settings"]["n_ctx"])

    @classmethod
    def detect(cls, client: Client) -> Server | None:
        try:
            known = client.get("/props")
        except (AbsentError, NotJsonError, UnsupportedError):
            return None
        return cls(client) if isinstance(known, dict) and "default_generation_settings" in known else None

    def encode(self, text: str) -> Prompt:
        return tokenized(self._client, {"content": text, "add_special": True})

    def ask(self, prompt: Prompt, steps: int, space: str | None) -> Answer:
        body = {
            "prompt": list(prompt),
            "n_predict": steps,
            "n_probs": _TOP,
            "post_sampling_probs": False,
            "temperature": 0,
            "cache_prompt": space is not None,
        }
        answer, seconds = timed(self._client, _PATH, body)
        with self._client.parsing(_PATH):
            steps_, tokens = read_content(answer["completion_probabilities"])
            timings = answer["timings"]
            reused = int(timings["cache_n"]) if "cache_n" in timings else len(prompt) - int(timings["prompt_n"])
            return Answer(steps_, tokens, reused, int(answer["tokens_evaluated"]), seconds)
