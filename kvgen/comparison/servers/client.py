"""Send JSON over HTTP within limits, and turn whatever goes wrong into one line."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from kvgen.errors import KvgenError, NotFoundError, UnsupportedError, UsageError, in_one_line

_MAX_BYTES = 64_000_000  # of one answer
_BUSY = (429, 503)  # statuses that say when to ask again
_API_PATH = re.compile(r"/(v1(/.*)?)?$")


class LimitError(KvgenError):
    """The allowed number of requests or seconds is used up."""


class AbsentError(NotFoundError):
    """The server has no such path: it is of another kind."""


class NotJsonError(KvgenError):
    """The answer is something else, such as a page."""


class Client:
    """Requests to one server. Threads may share it.

    url: with or without a path of the API, such as `/v1`. key_variable: environment variable that holds an API key.
    timeout: seconds for each request.
    max_requests, max_seconds: limits on all requests together. requests: their number so far.
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str | None = None,
        timeout: float = 60,
        max_requests: int = 400,
        max_seconds: float = 300,
    ) -> None:
        try:
            given = httpx2.URL(url)
            base = given.copy_with(path=_API_PATH.sub("", given.path), query=None, fragment=None)
            self._http = httpx2.Client(base_url=base, timeout=timeout, headers=_headers(key_variable))
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, ValueError) as error:
            raise UsageError(f"--url {url}: {in_one_line(error)}") from None
        if base.scheme not in ("http", "https") or not base.host:
            raise UsageError(f"--url {url}: wanted an address such as http://localhost:8000")
        self.url = str(base.copy_with(username=None, password=None)).rstrip("/")
        self._timeout, self._max_requests = timeout, max_requests
        self._max_seconds, self._ends = max_seconds, time.monotonic() + max_seconds
        self._lock = threading.Lock()
        self.requests = 0

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Start no request of the block later than this many seconds after now, or after the client's own limit."""
        limits = self._max_seconds, self._ends
        if (ends := time.monotonic() + seconds) < self._ends:
            self._max_seconds, self._ends = seconds, ends
        try:
            yield
        finally:
            self._max_seconds, self._ends = limits

    def close(self) -> None:
        """Close all connections; requests in progress fail."""
        self._http.close()

    def get(self, path: str) -> Any:
        return self._json(path, self._send("GET", path, None))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._json(path, self._send("POST", path, body))

    def text(self, path: str, method: str = "GET") -> str:
        """The body of an answer that is not JSON."""
        return self._send(method, path, None).decode("utf-8", "replace")

    @contextmanager
    def parsing(self, path: str) -> Iterator[None]:
        """Report an answer that lacks what it should have."""
        try:
            yield
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise KvgenError(f"{self.url}{path}: unexpected answer ({type(error).__name__}: {error})") from error

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        """Send a request; again, if the server is busy and says when to, and that is within the limits."""
        while True:
            response, data = self._sent(method, path, body)
            if response.status_code == 200:
                return data
            seconds = _retry_after(response) if response.status_code in _BUSY else None
            if seconds is None or time.monotonic() + seconds > self._ends:
                raise _status_error(f"{self.url}{path}", response, data)
            time.sleep(seconds)

    def _sent(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[httpx2.Response, bytes]:
        where, ends = f"{self.url}{path}", time.monotonic() + self._timeout
        self._count()
        try:
            with self._http.stream(method, path, json=body) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > _MAX_BYTES:
                        raise KvgenError(f"{where}: the answer has over {_MAX_BYTES // 10**6} MB")
                    if time.monotonic() > ends:
                        raise httpx2.ReadTimeout("the answer does not end")
        except httpx2.ConnectError as error:
            raise NotFoundError(f"{self.url}: no server answers there ({in_one_line(error)})") from error
        except httpx2.TimeoutException as error:
            raise KvgenError(f"{where}: no answer within {self._timeout:g} seconds; raise --timeout") from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise UsageError(f"--url {self.url}: {in_one_line(error)}") from error
        except httpx2.HTTPError as error:
            raise KvgenError(f"{where}: the connection broke ({in_one_line(error)}); look at the server") from error
        return response, bytes(data)

    def _count(self) -> None:
        with self._lock:
            if self.requests >= self._max_requests:
                raise LimitError(f"{self._max_requests} requests are used up; raise --max-requests")
            if time.monotonic() > self._ends:
                raise LimitError(f"{self._max_seconds:g} seconds are used up; raise --max-seconds")
            self.requests += 1

    def _json(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise NotJsonError(f"{self.url}{path}: the answer is no JSON: {_excerpt(data)}") from error


def _headers(key_variable: str | None) -> dict[str, str]:
    if key_variable is None:
        return {}
    if not (key := os.environ.get(key_variable)):
        raise UsageError(f"--api-key-env {key_variable}: the environment has no such variable, or it is empty")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"--api-key-env {key_variable}: the key has characters that no header can have")
    return {"Authorization": f"Bearer {key}"}


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds until a busy server wants to be asked again: a number of them, or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("retry-after", "")
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _status_error(where: str, response: httpx2.Response, data: bytes) -> KvgenError:
    status = response.status_code
    if status in (401, 403):
        return KvgenError(f"{where}: the server wants another API key ({status}); see --api-key-env")
    if status in (404, 405):
        return AbsentError(
            f"{where}: not there ({status}: {_excerpt(data)}); is the server of another kind? See --server-kind"
        )
    if target := response.headers.get("location"):
        return KvgenError(f"{where}: moved to {target} ({status}); give --url the new address")
    if status == 429:
        return KvgenError(f"{where}: too many requests for the server (429); try again later")
    if status >= 500:
        return KvgenError(f"{where}: the server failed ({status}: {_excerpt(data)})")
    return UnsupportedError(f"{where}: refused ({status}: {_excerpt(data)})")


def _excerpt(data: bytes) -> str:
    return " ".join(data[:400].decode("utf-8", "replace").split())[:200] or "an empty answer"
