"""HTTP to a server of kvgen, by TCP or a unix socket. Every failure is a KvgenError that names the server."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

from kvgen.client.wire import PREFIX, authorization, read_error
from kvgen.errors import KvgenError, ServerError, UsageError

_CONNECT_TIMEOUT = 10.0  # seconds; an answer may take as long as it takes to compute


class Connection(http.client.HTTPConnection):
    """A connection by TCP, or by a unix socket if `path` is given."""

    def __init__(self, host: str, port: int | None, path: str | None) -> None:
        super().__init__(host, port, timeout=_CONNECT_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        if self._path is None:
            super().connect()
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.connect(self._path)
        self.sock.settimeout(None)

    def abort(self) -> None:
        """End the connection, also for a thread that waits for an answer."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


class ServerAddress:
    """Where a server listens: `http://HOST:PORT`, or `unix:PATH`. key: that it asks for; None for none.

    Raises UsageError for another address, or a key that cannot be sent.
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self.name = address
        self._headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = authorization(key)
        self._path = address.removeprefix("unix:") if address.startswith("unix:") else None
        try:
            parts = urlsplit("http://localhost" if self._path else address)
            host, self._port = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or parts.scheme != "http":
            raise UsageError(f"--server {address}: give http://HOST:PORT, or unix:PATH for a socket")
        self._host = host
        self._prefix = quote(parts.path.rstrip("/").removesuffix("/v1"), safe="/%", errors="surrogateescape") + PREFIX

    def connect(self) -> Connection:
        """Return an open connection. Raises ServerError if no server answers."""
        try:
            connection = Connection(self._host, self._port, self._path)
            connection.connect()
        except (OSError, UnicodeError, http.client.InvalidURL) as error:  # the last two: no name of a host
            reason = getattr(error, "strerror", None) or error
            hint = "start one with kvgen serve, or leave --server and KVGEN_SERVER out"
            raise ServerError(f"--server {self.name}: no server answers there ({reason}); {hint}") from error
        return connection

    def ask(self, path: str, body: Any = None) -> Any:
        """Return the decoded answer to one request. Raises KvgenError, of the server's kind if it is the server's."""
        connection = self.connect()
        try:
            data = self._respond(connection, path, body).read()
            return json.loads(data)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.lost() from error
        finally:
            connection.close()

    def lines(
        self, path: str, body: Any, connection: Connection | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the lines of an answer, decoded, as they come. Closing it ends the request on the server.

        connection: to use, so that another thread can shut it down; None for a new one. Raises KvgenError as `ask`.
        """
        connection = connection or self.connect()
        try:
            response = self._respond(connection, path, body)
            while line := response.readline():
                yield json.loads(line)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.lost() from error
        finally:
            connection.close()

    def _respond(self, connection: Connection, path: str, body: Any) -> http.client.HTTPResponse:
        """Send a request, again while the server is too busy, and return its answer. Raises KvgenError for an error."""
        data = None if body is None else json.dumps(body).encode()
        while True:
            connection.request("GET" if data is None else "POST", self._prefix + path, data, self._headers)
            response = connection.getresponse()
            if response.status != http.client.TOO_MANY_REQUESTS:
                break
            response.read()
            time.sleep(float(response.headers.get("Retry-After", "1")))
        if response.status != http.client.OK:
            raise self._error(response)
        return response

    def _error(self, response: http.client.HTTPResponse) -> KvgenError:
        if response.status != http.client.NOT_FOUND:
            with suppress(ValueError, TypeError, KeyError):
                found = read_error(json.loads(response.read())["error"])
                return found if type(found) is not KvgenError else KvgenError(f"--server {self.name}: {found}")
        return KvgenError(f"--server {self.name}: no server of this version of kvgen (status {response.status})")

    def lost(self) -> ServerError:
        return ServerError(f"--server {self.name}: the server ended during the request")
