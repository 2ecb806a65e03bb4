"""Running a template that nobody vouches for: the environment that it expects, in a sandbox with limits."""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from kvgen.tokenizer.limits import MAX_CHARACTERS, Budget, allows_layout

MAX_SECONDS = 5.0
_MAX_SOURCE = 1_000_000  # characters of the template itself
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap")  # filters for web pages, slow on texts made for it


class RefusedError(Exception):
    """What a template raises by `raise_exception`."""


class TemplateTimeoutError(Exception):
    """A template that took too long."""


class Program:
    """A template, compiled when it is first rendered."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._template: jinja2.Template | None = None

    def render(self, values: Mapping[str, Any]) -> str:
        """The text. Raises TemplateTimeoutError, SecurityError if it makes too much, or whatever the template raises.

        It runs in a thread that an exception is thrown into when its time is up. That ends what is Python: loops,
        macros, the compiler. A single operation of the interpreter it does not end; none that the sandbox lets through
        takes long. (Another process could be ended at any point, but would cost its start for every rendering.)
        """
        outcome: list[str] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append("".join(self._pieces(values)))
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
        return outcome[0]

    def _pieces(self, values: Mapping[str, Any]) -> Iterator[str]:
        if self._template is None:
            if len(self._source) > _MAX_SOURCE:
                raise SecurityError(f"it is longer than {_MAX_SOURCE} characters")
            self._template = Sandbox().from_string(self._source)
        sandbox = self._template.environment
        assert isinstance(sandbox, Sandbox)
        sandbox.budget.renew()
        length = 0
        for piece in self._template.generate(values):
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise SecurityError(f"it writes more than {MAX_CHARACTERS} characters")
            yield piece


class _CountingGenerator(CodeGenerator):
    """Compiles what makes a value without a call or an operator so that the value is counted."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":  # not the names on the left of an assignment
            self._counted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _counted(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.budget.made(")
        visit(node, frame)
        self.write(")")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for, transformers' own, that counts what a template makes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _CountingGenerator

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.budget = Budget()
        self.filters["tojson"] = _to_json
        self.filters = {
            name: self._counted(name, function) for name, function in self.filters.items() if name not in _LEFT_OUT
        }
        del self.globals["lipsum"]
        self.globals["dict"] = lambda *arguments, **options: dict(*arguments, **options)
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now

    def concat(self, pieces: Iterable[str]) -> str:
        """The pieces as one text: of `~`, of macros, of `{% set %}` blocks."""
        pieces = list(pieces)
        self.budget.affords(sum(map(len, pieces)))
        return self.budget.made("".join(pieces))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator of `intercepted_binops`."""
        self.budget.allows_operator(operator, left, right)
        return self.budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *arguments: Any, **options: Any) -> Any:
        """Call a function, a macro or a method."""
        name, value = getattr(obj, "__name__", ""), getattr(obj, "__self__", None)
        if name == "join" and arguments:
            items = list(arguments[0])
            self.budget.allows_join(value, items)
            arguments = (items, *arguments[1:])
        self.budget.allows_call(name, value, arguments, options)
        return self.budget.made(super().call(context, obj, *arguments, **options))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """As jinja2's, which keeps formats from reaching attributes; and from absurd widths."""
        if getattr(value, "__name__", "") in ("format", "format_map"):
            self.budget.allows_format(getattr(value, "__self__", ""))
        return super().wrap_str_format(value)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        extra = 1 if hasattr(function, "jinja_pass_arg") else 0  # what jinja2 puts before the value

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            before, (value, *rest) = arguments[:extra], arguments[extra:]
            if name == "join":
                value = list(value)
                self.budget.allows_join(options["d"] if "d" in options else "".join(map(str, rest[:1])), value)
            self.budget.allows_call(name, value, rest, options)
            return self.budget.made(function(*before, value, *rest, **options))

        return counted


class _Generation(Extension):
    """`{% generation %}` marks, for training, what the model is to say. Here its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 wants it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Without names that mean something to Python, and without a text that would show all that it holds."""

    __repr__ = object.__repr__

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no place for {name!r}")
        super().__setitem__(name, value)


def _refuse(message: str) -> NoReturn:
    raise RefusedError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    allows_layout(indent, separators)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
