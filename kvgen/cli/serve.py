"""`kvgen serve`: an HTTP server for OpenAI's API."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Option

from kvgen import __version__
from kvgen.cli import options
from kvgen.cli.groups import ModelOptions, takes_groups
from kvgen.cli.remote import API_KEY
from kvgen.cli.render import escape_controls, notes, parse_bytes, print_note
from kvgen.errors import UnsupportedError, UsageError
from kvgen.generation.settings import DEFAULT_BATCH_SIZE

_option = partial(Option, rich_help_panel="Server")
_LOCAL, _PORT = "127.0.0.1", 8080


@takes_groups()
def serve(
    *,
    host: Annotated[str, _option(help=f"Address to listen on; others than 127.0.0.1 need {API_KEY}.")] = _LOCAL,
    port: Annotated[
        int | None, _option(min=0, max=65535, help="Port to listen on; 0 for a free one.", show_default="8080")
    ] = None,
    socket: Annotated[
        Path | None, _option(metavar="PATH", help="Listen on a unix socket; on a port too only with --port.")
    ] = None,
    detach: Annotated[
        bool, _option("--detach", help="Run in the background, with a socket in your runtime folder.")
    ] = False,
    stop_running: Annotated[
        bool, _option("--stop-running", help="End the server that --detach started, when its requests have ended.")
    ] = False,
    name: Annotated[str | None, _option(help="The model's name for clients.", show_default="as given")] = None,
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
    prompt_cache: Annotated[
        Path | None,
        _option(metavar="DIR", help="Keep the caches of finished requests in this folder when the server ends."),
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
    from kvgen.cli.background import background_socket, detached, stop_background
    from kvgen.cli.sockets import address_of, is_loopback, tcp_socket, unix_socket
    from kvgen.client.wire import authorization

    if stop_running:
        notes(quiet=quiet)(stop_background(background_socket() if socket is None else socket))
        return
    key = os.environ.get(API_KEY) or None
    expected = None if key is None else authorization(key)
    if not is_loopback(host) and key is None:
        raise UsageError(f"--host {host} can be reached by others: set {API_KEY} to a key that clients must give")
    most_bytes = None if max_cache_memory is None else parse_bytes(max_cache_memory)
    largest = parse_bytes(max_body)
    tell: Callable[[str], None] = notes(quiet=quiet)
    ends = "kvgen serve --stop-running"
    with ExitStack() as stack:
        if detach:
            if socket is None:
                socket = background_socket()
            else:
                socket = socket.absolute()
                ends += f" --socket {shlex.quote(str(socket))}"
            tell = detached(socket.with_suffix(".log"), quiet=quiet)
        # Bound before the model is loaded, so that an address in use is reported at once.
        listening = [] if socket is None else [stack.enter_context(unix_socket(socket))]
        if socket is None or port is not None:
            listening.append(tcp_socket(host, _PORT if port is None else port))
        loaded = source.load(quiet=quiet)
        try:
            from kvgen.server.app import Limits, Server, make_app
            from kvgen.server.own import OwnRoutes
            from kvgen.server.run import run_server
        except ModuleNotFoundError as error:
            raise UnsupportedError(f"kvgen serve needs {error.name}: pip install 'kvgen[serve]'") from None
        from kvgen.hub.names import default_reference
        from kvgen.server.engine import Engine
        from kvgen.server.saved import SavedCaches

        budget = loaded.cache_budget if most_bytes is None else most_bytes
        log = (lambda line: None) if quiet else (lambda line: print_note(escape_controls(line)))
        saved = None if prompt_cache is None else SavedCaches(prompt_cache, loaded, print_note)
        kept = [] if saved is None else saved.load(budget)
        engine = Engine(loaded, batch_size=batch_size, max_cache_bytes=budget, max_waiting=max_waiting, kept=kept)
        name = name or _name(source.model or default_reference(), loaded.source)
        server = Server(engine, name, Limits(largest, timeout), log, log_prompts)
        own = OwnRoutes(server, __version__, source.arguments())
        hosts = {"localhost", "127.0.0.1", "::1", host.lower()} if key is None else None
        app = make_app(server, own.routes(), authorization=expected, hosts=hosts)
        for one in listening:
            one.listen()  # from here on, clients are kept waiting instead of refused
        tell(_greeting(server.model, [address_of(one) for one in listening], ends if detach else None))
        ending = partial(notes(quiet=quiet), "requests in progress may end; Ctrl-C again to stop at once")
        in_peace = run_server(app, listening, engine, idle_timeout, ending)
        if saved is not None and in_peace:
            saved.save(engine.kept)


def _greeting(model: str, addresses: list[str], ends: str | None) -> str:
    """Say where a model is served. ends: the command that ends a server in the background; None for another."""
    where = " and ".join(f"{one}/v1" if one.startswith("http") else one for one in addresses)
    if ends is None:
        return f"serving {model} on {where}; Ctrl-C stops"
    return f"serving {model} on {where}\nuse it: export KVGEN_SERVER={addresses[0]}\nend it: {ends}"


def _name(reference: str, source: str) -> str:
    """Return the name in the catalogue or on the hub that a model was given by, else that of its file or folder."""
    is_name = reference != source and not Path(reference).expanduser().exists()
    return reference if is_name else Path(source).name.removesuffix(".gguf")
