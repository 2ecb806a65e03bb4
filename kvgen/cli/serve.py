"""`kvgen serve`: an HTTP server for OpenAI's API."""

from __future__ import annotations

import ipaddress
import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from kvgen.cli import options
from kvgen.cli.groups import ModelOptions, takes_groups
from kvgen.cli.render import escape_controls, notes, parse_bytes, print_note
from kvgen.errors import KvgenError, UnsupportedError, UsageError
from kvgen.generation.settings import DEFAULT_BATCH_SIZE

if TYPE_CHECKING:
    pass

_option = partial(Option, rich_help_panel="Server")
_KEY = "KVGEN_API_KEY"


@takes_groups()
def serve(
    *,
    host: Annotated[str, _option(help=f"Address to listen on; others than 127.0.0.1 need {_KEY}.")] = "127.0.0.1",
    port: Annotated[int, _option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8080,
    name: Annotated[str | None, _option(help="The model's name for clients.", show_default="its file's")] = None,
    batch_size: Annotated[int, _option(min=1, help="Maximum number of requests at a time.")] = DEFAULT_BATCH_SIZE,
    max_waiting: Annotated[int, _option(min=0, help="Maximum number that wait; more get status 429.")] = 256,
    max_cache_memory: Annotated[
        str | None,
        _option(
            metavar="SIZE",
            help="Memory limit for all caches, as in 2GB; those of finished requests stay until it is needed.",
            show_default="half of what the weights leave",
        ),
    ] = None,
    max_body: Annotated[str, _option(metavar="SIZE", help="Largest body of a request.")] = "8MB",
    timeout: Annotated[float | None, _option(min=0, metavar="SECONDS", help="End a request after this time.")] = None,
    idle_timeout: Annotated[
        float | None, _option(min=0, metavar="SECONDS", help="Stop after this time without requests.")
    ] = None,
    log_prompts: Annotated[bool, _option("--log-prompts", help="Write prompts to the log as well.")] = False,
    source: ModelOptions,
    quiet: options.Quiet = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

    The model stays in memory, and so do the caches of finished requests: a request that begins like an earlier one
    computes only what is new. Requests run side by side, each with the tokens that it would get alone.
    """
    key = os.environ.get(_KEY) or None
    if not _is_loopback(host) and key is None:
        raise UsageError(f"--host {host} can be reached by others: set {_KEY} to a key that clients must give")
    most_bytes = None if max_cache_memory is None else parse_bytes(max_cache_memory)
    largest = parse_bytes(max_body)
    listening = _listen(host, port)
    loaded = source.load(quiet=quiet)
    try:
        from kvgen.server.app import Limits, Server, make_app
        from kvgen.server.run import run_server
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"kvgen serve needs {error.name}: pip install 'kvgen[serve]'") from None
    from kvgen.server.engine import Engine

    budget = loaded.cache_budget if most_bytes is None else most_bytes
    engine = Engine(loaded, batch_size=batch_size, max_cache_bytes=budget, max_waiting=max_waiting)
    log = (lambda line: None) if quiet else (lambda line: print_note(escape_controls(line)))
    server = Server(engine, name or _name(loaded.source), Limits(largest, timeout), log, log_prompts)
    hosts = ["localhost", "127.0.0.1", "[::1]", host] if key is None else ["*"]
    listening.listen()  # from here on, clients are kept waiting instead of refused
    notes(quiet=quiet)(f"serving {server.model} on {_address(listening)}/v1; Ctrl-C stops")
    run_server(make_app(server, key=key, hosts=hosts), listening, engine, idle_timeout)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the model is loaded, so that a port in use is reported at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise KvgenError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from error
    return listening


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _name(source: str) -> str:
    return Path(source).name.removesuffix(".gguf")
