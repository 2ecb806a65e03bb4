"""What a comparison needs of a server: to ask it for the next tokens, with and without its cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvgen.comparison.servers.client import AbsentError, Client
from kvgen.errors import UnsupportedError

Token = int | str
Prompt = tuple[Token, ...]
"""Token ids, or pieces of text for a server that takes text only."""

Step = Mapping[Token, float]
"""Log-probabilities of the most likely tokens at one position, in nats."""

_COMMON = 4  # positions: a beginning-of-text token, for example


class NoLogprobsError(UnsupportedError):
    """The server gives no log-probabilities."""

    def __init__(self) -> None:
        super().__init__("the server gives no log-probabilities: there is nothing to compare")


@dataclass(frozen=True)
class Answer:
    """Greedy completion of a prompt.

    steps: one for each generated token. tokens: those generated.
    reused: positions that the server took from its cache; None if it does not say.
    length: positions of the prompt; None if the server does not say. seconds: from request to answer.
    """

    steps: tuple[Step, ...]
    tokens: Prompt
    reused: int | None
    length: int | None
    seconds: float

    @property
    def hit(self) -> bool:
        """Whether more was reused than the beginning that all prompts share, and no more than there is."""
        return self.reused is not None and _COMMON < self.reused <= (self.length or self.reused)

    @property
    def whole(self) -> bool:
        """Whether all of the prompt was reused but the position that is always computed."""
        return self.reused is not None and self.length is not None and self.reused >= self.length - 1


class Server(Protocol):
    """A server of one kind.

    model: what it serves. context: positions of its context; None if unknown.
    repeats: whether it can be asked for the same prompt without its cache again and again. If not, only the first
        request of a prompt is computed without it.
    """

    kind: str
    model: str
    context: int | None
    repeats: bool

    @classmethod
    def detect(cls, client: Client) -> Server | None:
        """The server behind `client`; None if it is of another kind."""

    def encode(self, text: str) -> Prompt:
        """Token ids of a text, or its words if the server takes text only."""

    def ask(self, prompt: Prompt, steps: int, space: str | None) -> Answer:
        """Complete `prompt` greedily by `steps` tokens.

        space: requests that name the same space may reuse what others of it left in the cache; None for a request that
        is computed without reading the cache.
        """


class OwnedServer(Server):
    """A server that calls itself the owner of its model in `/v1/models`, and encodes text at `/tokenize`."""

    repeats = True

    def __init__(self, client: Client, model: dict[str, Any]) -> None:
        """model: what `/v1/models` says of it."""
        self._client = client
        with client.parsing("/v1/models"):
            self.model, self.context = str(model["id"]), self._context(model)

    @classmethod
    def detect(cls, client: Client) -> Server | None:
        try:
            model = first_model(client)
        except AbsentError:
            return None
        return cls(client, model) if model.get("owned_by") == cls.kind else None

    def encode(self, text: str) -> Prompt:
        return tokenized(self._client, {"model": self.model, "prompt": text})

    @staticmethod
    def _context(model: Mapping[str, Any]) -> int | None:
        """Positions of the context, as vLLM and SGLang list them."""
        length = model.get("max_model_len")
        return None if length is None else int(length)


def pieces(text: str) -> Prompt:
    """Words of a text, each with the space before it."""
    first, *words = text.split(" ")
    return (first, *(f" {word}" for word in words))


def read_content(content: Sequence[Any]) -> tuple[tuple[Step, ...], Prompt]:
    """Steps and tokens of the chat form of log-probabilities: a list of tokens, each with its `top_logprobs`.

    Raises NoLogprobsError if a token has none.
    """
    steps = tuple({_key(token): float(token["logprob"]) for token in one["top_logprobs"]} for one in content)
    if not all(steps):
        raise NoLogprobsError
    return steps, tuple(_key(one) for one in content)


def read_logprobs(logprobs: Any) -> tuple[tuple[Step, ...], Prompt]:
    """Steps and tokens of the `logprobs` of a completion. Raises NoLogprobsError if there are none."""
    if not logprobs:
        raise NoLogprobsError
    if logprobs.get("content"):
        return read_content(logprobs["content"])
    top = logprobs.get("top_logprobs")
    if not top or not all(top):
        raise NoLogprobsError
    steps = tuple({_token(name): float(value) for name, value in step.items()} for step in top)
    return steps, tuple(_token(name) for name in logprobs["tokens"])


def _key(token: Mapping[str, Any]) -> Token:
    return int(token["id"]) if "id" in token else _token(token["token"])


def _token(name: str) -> Token:
    """A token's text, or its id from the form `token_id:17`."""
    number = name.removeprefix("token_id:")
    return int(number) if number != name and number.isdigit() else name


def read_usage(usage: Mapping[str, Any] | None) -> tuple[int | None, int | None]:
    """Counts of reused positions and of all positions of the prompt, from the `usage` of an answer; None if absent."""
    found = usage or {}
    counts = (found.get("prompt_tokens_details") or {}).get("cached_tokens"), found.get("prompt_tokens")
    reused, length = (None if count is None else int(count) for count in counts)
    return reused, length


def timed(client: Client, path: str, body: dict[str, Any]) -> tuple[Any, float]:
    """Answer to a POST, and the seconds that it took."""
    began = time.perf_counter()
    return client.post(path, body), time.perf_counter() - began


def tokenized(client: Client, body: Mapping[str, Any]) -> Prompt:
    """Token ids that `/tokenize` answers to a body."""
    answer = client.post("/tokenize", dict(body))
    with client.parsing("/tokenize"):
        if tokens := tuple(int(id_) for id_ in answer["tokens"]):
            return tokens
        raise ValueError("no tokens")


def first_model(client: Client) -> dict[str, Any]:
    """What `/v1/models` says of the first model; empty if it lists none. Raises AbsentError without that path."""
    models = client.get("/v1/models")
    with client.parsing("/v1/models"):
        return dict(models["data"][0]) if models["data"] else {}
