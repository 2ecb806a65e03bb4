"""Find out of which kind a server is."""

from __future__ import annotations

from kvgen.comparison.servers.client import Client
from kvgen.comparison.servers.kvgen import KvgenServer
from kvgen.comparison.servers.llama_cpp import LlamaCppServer
from kvgen.comparison.servers.openai import OpenAIServer
from kvgen.comparison.servers.server import Server
from kvgen.comparison.servers.sglang import SglangServer
from kvgen.comparison.servers.vllm import VllmServer
from kvgen.errors import NotFoundError, UsageError

KINDS: dict[str, type[Server]] = {
    kind.kind: kind for kind in (LlamaCppServer, VllmServer, SglangServer, KvgenServer, OpenAIServer)
}
"""Kinds of servers, in the order in which they are tried: the last is what all of them speak."""


def connect(client: Client, kind: str | None = None) -> Server:
    """Return the server behind `client`. kind: its kind; None to find out.

    Raises UsageError for an unknown kind, NotFoundError if there is no server, or none of that kind.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--server-kind {kind}: unknown; known: {', '.join(KINDS)}")
    for name in KINDS if kind is None else (kind,):
        if server := KINDS[name].detect(client):
            return server
    wanted = "of a known kind" if kind is None else f"of the kind {kind}"
    raise NotFoundError(f"{client.url}: the server there is not {wanted}; see --server-kind")
