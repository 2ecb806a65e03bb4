"""Routes for kvgen's own client, which needs more than OpenAI's API has. Answers are JSON, or lines of JSON."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from kvgen.client.wire import PREFIX, error_as_json, event_as_json, read_request
from kvgen.errors import KvgenError, UsageError
from kvgen.generation.scores import Score
from kvgen.generation.scoring import score_steps
from kvgen.generation.settings import Request as Asked
from kvgen.generation.settings import are_ids, is_whole
from kvgen.generation.stream import text_ids
from kvgen.generation.text import Chunk
from kvgen.pipeline.record import describe_model
from kvgen.server.answers import as_json, error_body
from kvgen.server.app import JsonResponse, Server
from kvgen.server.events import Events, watched
from kvgen.server.schema import Job, check_length, check_request
from kvgen.tokenizer import Tokenizer
from kvgen.tokenizer.chat import check_messages

_Route = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class OwnRoutes:
    """The routes. version: of kvgen. arguments: of `kvgen.load`, for the model of the server."""

    server: Server
    version: str
    arguments: Mapping[str, Any]

    def routes(self) -> list[Route]:
        """Return the routes for `make_app`."""
        asked = {"model": self.model, "record": self.record}
        sent = {
            "cache-bytes": self.cache_bytes,
            "encode": self.encode,
            "tokens": self.tokens,
            "pieces": self.pieces,
            "run": self.run,
            "score": self.score,
        }
        return [
            *(Route(f"{PREFIX}/{name}", self._answering(route)) for name, route in asked.items()),
            *(Route(f"{PREFIX}/{name}", self._answering(route), methods=["POST"]) for name, route in sent.items()),
        ]

    def _answering(self, route: _Route) -> _Route:
        """Answer with the client's form of errors."""

        async def answer(request: Request) -> Response:
            try:
                return await route(request)
            except KvgenError as error:
                status, _ = error_body(error)
                return self.server.refused(request, status, str(error), {"error": error_as_json(error)})

        return answer

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.server.engine.loaded.tokenizer

    async def model(self, request: Request) -> Response:
        """Facts of the model, of its tokenizer and of the process."""
        loaded, template = self.server.engine.loaded, self._tokenizer.chat_template
        return JsonResponse(
            {
                "version": self.version,
                "pid": os.getpid(),
                "source": loaded.source,
                "engine": loaded.model.engine,
                "dtype": str(loaded.model.dtype),
                "device": str(loaded.model.device),
                "context_length": loaded.model.context_length,
                "position_bytes": loaded.model.position_bytes,
                "special_ids": sorted(self._tokenizer.special_ids),
                "chat_template": None if template is None else template.source,
                "ids": self.arguments["tokenizer"] == "ids",
            }
        )

    async def record(self, request: Request) -> Response:
        return JsonResponse(await run_in_threadpool(describe_model, self.arguments, self.server.engine.loaded))

    async def cache_bytes(self, request: Request) -> Response:
        positions = (await self._fields(request, "positions")).get("positions")
        if not is_whole(positions) or not 0 <= positions < 2**63:
            raise UsageError("`positions` must be a whole number")
        return JsonResponse({"bytes": self.server.engine.loaded.model.cache_bytes(positions)})

    async def encode(self, request: Request) -> Response:
        body = await self._fields(request, "text", "messages", "parse_special", "chat_template")
        return JsonResponse({"ids": await run_in_threadpool(self._encode, body)})

    def _encode(self, body: Mapping[str, Any]) -> list[int]:
        special, template, text = body.get("parse_special", False), body.get("chat_template"), body.get("text")
        if not isinstance(special, bool) or not isinstance(template, str | None):
            raise UsageError("`parse_special` must be true or false, `chat_template` a text")
        if isinstance(text, str):
            check_length(text, self.server.engine.loaded)
            return self._tokenizer.encode(text, parse_special=special)
        tokenizer = self._tokenizer if template is None else self._tokenizer.with_chat_template(template)
        messages = check_messages(body.get("messages"))
        check_length(messages, self.server.engine.loaded)
        return tokenizer.encode_chat(messages, parse_special=special)

    async def tokens(self, request: Request) -> Response:
        ids = _ids(await self._fields(request, "ids"))
        return JsonResponse({"texts": await run_in_threadpool(lambda: [self._tokenizer.token(id_) for id_ in ids])})

    async def pieces(self, request: Request) -> Response:
        ids = _ids(await self._fields(request, "ids"))
        found = await run_in_threadpool(lambda: list(self._tokenizer.pieces(ids)))
        return JsonResponse({"pieces": [(text, places.start, places.stop) for text, places in found]})

    async def run(self, request: Request) -> Response:
        """Complete a request; a line for each chunk, or the error."""
        began = time.monotonic()
        asked = await run_in_threadpool(self._read, await self.server.body(request))
        events = Events(
            self.server.dispatcher, Job((asked,), chat=False, stream=True), began, self.server.limits.timeout
        )
        return await _lines(request, self._run(events, partial(self._done, request, len(asked.prompt), began)))

    def _read(self, body: Mapping[str, Any]) -> Asked:
        asked = read_request(body)
        check_request(asked, self.server.engine.loaded)
        return asked

    async def _run(self, events: Events, done: Callable[[list[Chunk]], None]) -> AsyncGenerator[dict[str, Any], None]:
        chunks: list[Chunk] = []
        async with aclosing(events):
            try:
                async for arrived in events:
                    for _, chunk in arrived:
                        chunks.append(chunk)
                        yield event_as_json(chunk)
            finally:
                if chunks:
                    done(chunks)

    def _done(self, request: Request, prompt: int, began: float, chunks: list[Chunk]) -> None:
        self.server.log_completion(request.url.path, prompt, len(chunks), chunks[0].step.reused, began)

    async def score(self, request: Request) -> Response:
        """Score a text; a line for each window, then the result or the error."""
        body = await self._fields(request, "text", "window", "stride")
        if not isinstance(body.get("text"), str):
            raise UsageError("`text` must be a text")
        return await _lines(request, self._score(**body))

    async def _score(
        self, text: str, window: int | None = None, stride: int | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        loaded = self.server.engine.loaded
        ids = await run_in_threadpool(text_ids, loaded, text)  # not between passes: a long text takes seconds
        steps = score_steps(loaded, ids, window=window, stride=stride)

        def advance() -> tuple[int, int] | Score:  # one window at a time, so that requests go on in between
            try:
                return next(steps)
            except StopIteration as ended:
                score: Score = ended.value
                return score

        while not isinstance(found := await asyncio.wrap_future(self.server.engine.call(advance)), Score):
            yield {"done": found[0], "total": found[1]}
        yield vars(found)

    async def _fields(self, request: Request, *known: str) -> dict[str, Any]:
        """Read the body of a request. Raises UsageError for other fields than the known ones."""
        body = await self.server.body(request)
        if unknown := sorted(body.keys() - set(known)):
            raise UsageError(f"`{unknown[0]}` is not a field that kvgen knows")
        return body


def _ids(body: Mapping[str, Any]) -> list[int]:
    ids = body.get("ids")
    if not isinstance(ids, list) or not are_ids(ids) or not all(0 <= id_ < 2**31 for id_ in ids):
        raise UsageError("`ids` must be token ids")
    return list(ids)


async def _lines(request: Request, values: AsyncGenerator[dict[str, Any], None]) -> Response:
    """Answer with a line for each value. An error before the first one has its status, a later one is the last line."""
    async with watched(request):
        first = await anext(values)

    async def lines() -> AsyncGenerator[bytes, None]:
        async with aclosing(values):
            yield as_json(first) + b"\n"
            try:
                async for value in values:
                    yield as_json(value) + b"\n"
            except KvgenError as error:
                yield as_json({"error": error_as_json(error)}) + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")
