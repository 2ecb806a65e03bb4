"""The ASGI application: routes, limits, streams and errors."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvgen.errors import KvgenError, NotFoundError, UsageError
from kvgen.generation.text import Chunk
from kvgen.pipeline.rows import parse_json
from kvgen.server.answers import Answer, as_json, error_body, openai_error
from kvgen.server.engine import Engine
from kvgen.server.events import LEFT, Dispatcher, Events, watched
from kvgen.server.metrics import Metrics
from kvgen.server.schema import Job, check_length, parse_chat, parse_completion

_RETRY_AFTER = "1"  # seconds


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return as_json(content)


@dataclass(frozen=True)
class Limits:
    """max_body: bytes of a request. timeout: seconds for a request, waiting included; None for no limit."""

    max_body: int = 8 << 20
    timeout: float | None = None

    def check_body(self, size: int) -> None:
        """Raise HTTPException for a body of too many bytes."""
        if size > self.max_body:
            raise HTTPException(413, f"the body is larger than {self.max_body} bytes")

    async def read(self, request: Request) -> bytes:
        """Read the body. Raises HTTPException if it is too large or not JSON by its type, or if the client leaves."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page in a browser cannot send this type without asking first
            raise HTTPException(415, "the content type must be application/json")
        data, announced = bytearray(), request.headers.get("content-length", "0")  # digits, says h11
        try:
            self.check_body(int(announced))  # before a client that expects "100 Continue" sends it
            async for part in request.stream():
                data += part
                self.check_body(len(data))
        except ClientDisconnect:
            raise HTTPException(LEFT, "the client left before it had sent the body") from None
        return bytes(data)


@dataclass
class Server:
    """What the routes share. model: the name that clients see. log: takes one line for each request."""

    engine: Engine
    model: str
    limits: Limits
    log: Callable[[str], None]
    log_prompts: bool = False

    def __post_init__(self) -> None:
        self.metrics, self.dispatcher = Metrics(self.engine), Dispatcher(self.engine)
        self.created = int(time.time())

    async def health(self, request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        self._check_model({"model": request.path_params["name"]})
        return JsonResponse(self._model())

    def _model(self) -> dict[str, Any]:
        context = self.engine.loaded.model.context_length
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "kvgen",
            "context_length": context,
        }

    def _check_model(self, body: Mapping[str, Any]) -> None:
        asked = body.get("model")
        if asked is not None and asked != self.model:
            raise NotFoundError(f"the model {asked!r:.80} does not exist here; there is {self.model!r}")

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=self.metrics.media_type)

    async def tokenize(self, request: Request) -> Response:
        body = await self.body(request)
        if not isinstance(text := body.get("prompt"), str):
            raise UsageError("`prompt` must be a string")
        loaded = self.engine.loaded
        check_length(text, loaded)
        ids = await run_in_threadpool(loaded.tokenizer.encode, text)
        return JsonResponse({"tokens": ids, "count": len(ids)})

    async def complete(self, request: Request, parse: Callable[[Mapping[str, Any], Any], Job]) -> Response:
        """Answer /v1/completions or /v1/chat/completions."""
        began = time.monotonic()
        body, job = await run_in_threadpool(self._parse, await self.limits.read(request), parse)
        if self.log_prompts:
            self.log(json.dumps({"prompt": body.get("prompt", body.get("messages"))}))
        answer = Answer(job, self.model, self.engine.loaded.tokenizer)
        events = Events(self.dispatcher, job, began, self.limits.timeout)
        done = partial(self._done, request.url.path, answer, began)
        if job.stream:
            async with watched(request):
                first = await events.first()  # so that an error has its status
            return StreamingResponse(self._stream(answer, first, events, done), media_type="text/event-stream")
        async with aclosing(events), watched(request):
            async for chunks in events:
                for index, chunk in chunks:
                    answer.choices[index].chunks.append(chunk)
        done()
        return JsonResponse(answer.whole())

    def _parse(self, data: bytes, parse: Callable[[Mapping[str, Any], Any], Job]) -> tuple[dict[str, Any], Job]:
        """Return the decoded body of a request, and what it asks for. Takes seconds for a large one."""
        body = _parse_object(data)
        self._check_model(body)
        return body, parse(body, self.engine.loaded)

    async def _stream(
        self, answer: Answer, first: list[tuple[int, Chunk]], events: Events, done: Callable[[], None]
    ) -> AsyncIterator[bytes]:
        async with aclosing(events):
            try:
                yield _pieces(answer, first)
                async for chunks in events:
                    if data := _pieces(answer, chunks):
                        yield data
            except KvgenError as error:
                yield _event(as_json(error_body(error)[1]))
                return
            finally:
                done()
            usage = _event(answer.last_piece()) if answer.job.include_usage else b""
            yield usage + b"data: [DONE]\n\n"

    def _done(self, path: str, answer: Answer, began: float) -> None:
        usage = answer.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.log_completion(path, usage["prompt_tokens"], usage["completion_tokens"], cached, began)

    def log_completion(self, path: str, prompt: int, completion: int, reused: int | None, began: float) -> None:
        """Write the line of a request that was answered. prompt, completion, reused: tokens."""
        seconds = time.monotonic() - began
        self.log(f"POST {path} 200: {prompt} + {completion} tokens, {reused} reused, {seconds:.2f} s")

    def refused(self, request: Request, status: int, message: str, body: Mapping[str, Any]) -> Response:
        """Return the response to a request that is refused, and write its line."""
        self.log(f"{request.method} {request.url.path} {status}: {message:.200}")
        return JsonResponse(body, status, {"Retry-After": _RETRY_AFTER} if status == 429 else None)

    async def body(self, request: Request) -> dict[str, Any]:
        """Read and decode the body. Raises HTTPException as `Limits.read`, UsageError if it is not a JSON object."""
        return await run_in_threadpool(_parse_object, await self.limits.read(request))  # a large one takes seconds


def _parse_object(data: bytes) -> dict[str, Any]:
    body = parse_json(data)
    if not isinstance(body, dict):
        raise UsageError("the body must be a JSON object")
    return body


def _pieces(answer: Answer, chunks: list[tuple[int, Chunk]]) -> bytes:
    """The events of a stream for the chunks of a pass."""
    return b"".join(_event(piece) for index, chunk in chunks if (piece := answer.piece(index, chunk)))


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class _Authorized:
    """Middleware that asks for an API key on all paths but /health."""

    def __init__(self, app: ASGIApp, authorization: bytes) -> None:
        self._app, self._authorization = app, authorization

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(scheme.title() + b" " + key, self._authorization):
                error = _error(401, "the API key is missing or wrong", "invalid_api_key")
                response = JsonResponse(error, 401, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _KnownHosts:
    """Middleware that refuses other names of the server, which a page in a browser could have pointed at it."""

    def __init__(self, app: ASGIApp, hosts: Container[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _host(Headers(scope=scope).get("host", "")) not in self._hosts:
            await JsonResponse(_error(400, "the Host header names another computer"), 400)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _host(header: str) -> str | None:
    """Return the host of a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return openai_error(message, kind, code)


def make_app(
    server: Server, more: Sequence[Route], *, authorization: bytes | None, hosts: Container[str] | None
) -> Starlette:
    """Return the application. more: further routes.

    authorization: the header that clients must give; None for none. hosts: names that clients may use for the server,
    in lower case; None for any.
    """

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            status = error.status_code
            body = _error(status, str(error.detail))
        else:
            assert isinstance(error, KvgenError)
            status, body = error_body(error)
        return server.refused(request, status, str(body["error"]["message"]), body)

    routes = [
        Route("/health", server.health),
        Route("/metrics", server.show_metrics),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.one_model),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/v1/completions", partial(server.complete, parse=parse_completion), methods=["POST"]),
        Route("/v1/chat/completions", partial(server.complete, parse=parse_chat), methods=["POST"]),
        *more,
    ]
    middleware = [] if hosts is None else [Middleware(_KnownHosts, hosts=hosts)]
    if authorization is not None:
        middleware.append(Middleware(_Authorized, authorization=authorization))
    handlers: dict[Any, Any] = {KvgenError: failed, HTTPException: failed}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app
