"""The sockets that `kvgen serve` listens on."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kvgen.errors import KvgenError


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tcp_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket. Raises KvgenError for a port in use.

    asyncio turns Nagle's algorithm off where the protocol is named. With it, the body of an answer waits 40 ms, until
    the client acknowledges the header.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise KvgenError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from error
    return listening


def address_of(listening: socket.socket) -> str:
    """Return the address of a bound socket, as `--server` takes it."""
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}"
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """Yield a bound socket that only this user can connect to, and remove it at the end.

    A lock beside it tells a server that runs from the socket of one that was killed. Raises KvgenError if a server
    runs there, or the socket cannot be made.
    """
    lock = FileLock(lock_of(path))
    try:
        lock.acquire(blocking=False)
        if path.exists() and not path.is_socket():
            raise KvgenError(f"--socket {path}: there is a file that is no socket")
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(mask)
    except Timeout:
        raise KvgenError(f"--socket {path}: a server runs there already; kvgen serve --stop-running ends one") from None
    except OSError as error:
        raise KvgenError(f"--socket {path}: cannot listen there ({error.strerror or error})") from error
    try:
        yield listening
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
