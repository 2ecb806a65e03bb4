"""Render one chat template in a process of its own: the program that `sandbox.py` starts.

It reads JSON lines: first {"source", "max_seconds", "max_characters", "max_memory"}, then the variables of one
rendering each. It answers each line with {}, {"text"}, {"refused"} or {"error"}. It imports nothing of kvgen.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # the folders of jinja2 and markupsafe

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_ORPHAN_SECONDS = 5  # after the parent's clock: ends a rendering whose parent is gone


class RefusedError(Exception):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """Render the content of `{% generation %}` blocks, which mark the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def make_environment() -> Environment:
    """Return the environment of transformers' `apply_chat_template`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Renderer:
    """Compile a template at its first rendering and answer requests."""

    def __init__(self, source: str, max_characters: int) -> None:
        self._source, self._max_characters = source, max_characters

    def answer(self, line: bytes) -> Mapping[str, str]:
        try:
            return {"text": self._render(json.loads(line))}
        except RefusedError as error:
            return {"refused": _one_line(error)}
        except MemoryError:
            return {"error": "it needs too much memory"}
        except Exception as error:  # noqa: BLE001 (a template can make Python raise anything)
            return {"error": f"{type(error).__name__}: {_one_line(error)}"}

    def _render(self, values: Mapping[str, Any]) -> str:
        if not hasattr(self, "_template"):
            self._template = make_environment().from_string(self._source)
        pieces, length = [], 0
        for piece in self._template.generate(values):
            length += len(piece)
            if length > self._max_characters:
                raise SecurityError(f"it writes more than {self._max_characters} characters")
            pieces.append(piece)
        return "".join(pieces)


def _one_line(error: Exception) -> str:
    return " ".join(str(error)[:200].split())


def _limit_memory(size: int) -> None:
    with suppress(ImportError, OSError, ValueError):  # absent on Windows; macOS refuses RLIMIT_AS
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    """Answer requests until stdin closes."""
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but the answers reaches the parent
    settings = json.loads(requests.readline())
    _limit_memory(settings["max_memory"])
    renderer = Renderer(settings["source"], settings["max_characters"])
    answer: Mapping[str, str] = {}
    while True:
        answers.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        answers.flush()
        line = requests.readline()
        if not line:
            return
        if hasattr(signal, "alarm"):
            signal.alarm(math.ceil(settings["max_seconds"]) + _ORPHAN_SECONDS)
        answer = renderer.answer(line)
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    main()
