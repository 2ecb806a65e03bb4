"""Running a template that nobody vouches for: a sandbox, and limits on time and size."""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 5.0
MAX_CHARACTERS = 10_000_000
_MAX_BITS = 4096  # of a number
_WIDTHS = re.compile(r"\d{7,}|\*")  # in a format; seven digits are a million characters
_PADDING = {"format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap"}


class RefusedError(Exception):
    """What a template raises by `raise_exception`."""


class TemplateTimeoutError(Exception):
    """A template that took too long."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for, transformers' own, without what takes all memory at once.

    A loop is ended by the clock, so here are only the single operations that the clock cannot end: products, powers and
    padding of absurd sizes.
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.filters["tojson"] = _to_json
        for name in ("center", "indent", "wordwrap", "format"):
            self.filters[name] = _guarded(self.filters[name], name)
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, (str, list, tuple))]
        counts = [abs(side) for side in (left, right) if isinstance(side, int)]
        if operator == "*" and sizes and counts and sizes[0] * counts[0] > MAX_CHARACTERS:
            raise SecurityError("a product is too long")
        if operator == "*" and not sizes and sum(count.bit_length() for count in counts) > _MAX_BITS:
            raise SecurityError("a number is too large")
        if operator == "**" and len(counts) == 2 and counts[0].bit_length() * counts[1] > _MAX_BITS:
            raise SecurityError("a power is too large")
        if operator == "%" and isinstance(left, str) and _WIDTHS.search(left):
            raise SecurityError("a format is too wide")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *arguments: Any, **options: Any) -> Any:
        name = getattr(obj, "__name__", "")
        if name in _PADDING:
            _check_width(name, arguments, options)
        return super().call(context, obj, *arguments, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if _WIDTHS.search(str(getattr(value, "__self__", ""))):
            raise SecurityError("a format is too wide")
        return super().wrap_str_format(value)


class _Generation(Extension):
    """`{% generation %}` marks, for training, what the model is to say. Here its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 wants it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def render_limited(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """The text of a template. Raises TemplateTimeoutError, SecurityError if it is too long, or what it raises.

    It runs in a thread that an exception is thrown into when its time is up, since no library ends a loop in Python
    from outside. A single operation that runs on after that is left behind with its thread.
    """
    result: list[str] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            length = 0
            for piece in template.generate(values):
                length += len(piece)
                if length > MAX_CHARACTERS:
                    raise SecurityError(f"it writes more than {MAX_CHARACTERS} characters")
                result.append(piece)
        except BaseException as error:  # noqa: BLE001 (raised again where the caller is)
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TemplateTimeoutError)
        )
        thread.join(1.0)
        raise TemplateTimeoutError(f"it takes longer than {MAX_SECONDS:g} seconds")
    if failure:
        raise failure[0]
    return "".join(result)


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def guarded(value: Any, *arguments: Any, **options: Any) -> Any:
        if name == "format" and _WIDTHS.search(str(value)):
            raise SecurityError("a format is too wide")
        _check_width(name, arguments, options)
        return function(value, *arguments, **options)

    return guarded


def _check_width(name: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    if any(isinstance(value, int) and value > MAX_CHARACTERS for value in (*arguments, *options.values())):
        raise SecurityError(f"the width of {name} is too large")


def _refuse(message: str) -> NoReturn:
    raise RefusedError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
