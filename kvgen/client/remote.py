"""A model on a server, with the methods of `Loaded`, `Backend`, `Tokenizer` and `Conversation` that commands use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvgen.client.batch import RemoteBatch
from kvgen.client.connection import ServerAddress
from kvgen.client.wire import read_error
from kvgen.errors import KvgenError
from kvgen.generation.conversation import Conversation
from kvgen.generation.scores import Score
from kvgen.generation.settings import DEFAULT_BATCH_SIZE
from kvgen.tokenizer.chat import Message


@dataclass(frozen=True)
class RemoteModel:
    """Facts of a model on a server, as in `Backend`."""

    server: ServerAddress
    engine: str
    dtype: str
    device: str
    context_length: int | None
    position_bytes: int | None

    def cache_bytes(self, positions: int) -> int:
        """See `Backend.cache_bytes`."""
        count: int = self.server.ask("/cache-bytes", {"positions": positions})["bytes"]
        return count

    def watch(self, progress: Callable[[int, int], None] | None) -> bool:
        """See `Backend.watch`, which a server does not support."""
        return False


class RemoteTokenizer:
    """The tokenizer of a server, as in `Tokenizer`. own_template: whether `chat_template` is not the server's."""

    def __init__(
        self,
        server: ServerAddress,
        special_ids: frozenset[int],
        chat_template: str | None,
        *,
        own_template: bool = False,
    ) -> None:
        self.special_ids, self.chat_template = special_ids, chat_template
        self._server, self._own_template = server, own_template
        self._tokens: dict[int, str] = {}
        self._expected: set[int] = set()

    def with_chat_template(self, source: str) -> RemoteTokenizer:
        """See `Tokenizer.with_chat_template`."""
        return RemoteTokenizer(self._server, self.special_ids, source, own_template=True)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._encode({"text": text, "parse_special": parse_special})

    def encode_chat(self, messages: Sequence[Message], *, parse_special: bool = False) -> list[int]:
        """See `Tokenizer.encode_chat`."""
        template = {"chat_template": self.chat_template} if self._own_template else {}
        return self._encode({"messages": list(messages), "parse_special": parse_special, **template})

    def _encode(self, body: Mapping[str, Any]) -> list[int]:
        ids: list[int] = self._server.ask("/encode", body)["ids"]
        return ids

    def expect(self, ids: Sequence[int]) -> None:
        """Prepare for calls of `token`: the texts of these ids are fetched together with the first."""
        self._expected.update(ids)

    def token(self, id_: int) -> str:
        """See `Tokenizer.token`."""
        if id_ not in self._tokens:
            ids = sorted({id_, *self._expected} - self._tokens.keys())
            texts = self._server.ask("/tokens", {"ids": ids})["texts"]
            self._tokens.update(zip(ids, texts, strict=True))
        return self._tokens[id_]

    def pieces(self, ids: Sequence[int]) -> Iterator[tuple[str, range]]:
        """See `Tokenizer.pieces`."""
        for text, start, stop in self._server.ask("/pieces", {"ids": list(ids)})["pieces"]:
            yield text, range(start, stop)


@dataclass(frozen=True)
class Remote:
    """A model on a server, as in `Loaded`. ids: whether its texts are token ids."""

    server: ServerAddress
    model: RemoteModel
    tokenizer: RemoteTokenizer
    source: str
    ids: bool

    def batch(self, batch_size: int = DEFAULT_BATCH_SIZE) -> RemoteBatch:
        """Return what completes requests. batch_size: most requests at a time."""
        return RemoteBatch(self.server, batch_size, self.tokenizer.expect)

    def score(
        self, text: str, *, window: int | None, stride: int | None, progress: Callable[[int, int], None]
    ) -> Score:
        """Score a text, as `kvgen.score` does. Raises as it does."""
        for line in self.server.lines("/score", {"text": text, "window": window, "stride": stride}):
            if "error" in line:
                raise read_error(line["error"])
            if "done" in line:
                progress(line["done"], line["total"])
            else:
                self.tokenizer.expect(line["ids"])
                return Score(tuple(line["ids"]), tuple(line["logprobs"]), line["window"], line["stride"])
        raise self.server.lost()

    def describe(self) -> Mapping[str, Any]:
        """Return the description of the model for run records, see `describe_model`."""
        described: Mapping[str, Any] = self.server.ask("/record")
        return described


@dataclass
class RemoteConversation(Conversation):
    """A conversation with a model on a server, whose caches stay there. loaded: a `Remote`."""

    loaded: Any

    def _batch(self) -> Any:
        return self.loaded.batch(1)


def connect(address: str, key: str | None, version: str) -> Remote:
    """Connect to the server at an address. key: its API key; None for none. version: of kvgen, here.

    Raises KvgenError if there is no server, or one of another version of kvgen.
    """
    server = ServerAddress(address, key)
    facts = server.ask("/model")
    found = facts.get("version") if isinstance(facts, dict) else None
    if found != version:
        versions = f"the server is kvgen {found}, this is {version}"
        raise KvgenError(f"--server {address}: {versions}; restart it with the same version")
    names = ("engine", "dtype", "device", "context_length", "position_bytes")
    tokenizer = RemoteTokenizer(server, frozenset(facts["special_ids"]), facts["chat_template"])
    model = RemoteModel(server, **{name: facts[name] for name in names})
    return Remote(server, model, tokenizer, facts["source"], facts["ids"])
