"""Command classes for Typer: plain help texts, hints for unknown options, and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from typer import Exit, Typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from kvgen.cli.errors import EXIT_INTERRUPTED, exit_codes, prepare_stderr, prepare_stdout, print_error
from kvgen.cli.interrupts import exit_now

# Typer has no options with an optional value.
_OPTIONAL_VALUES = {"--verify-cache": "--verify-cache=1", "--ray": "--ray=here"}
# Options of llama.cpp, mlx-lm, llm and transformers that kvgen has under a different name.
_FOREIGN_NAMES = {
    "--temperature": "--temp",
    "--max-tokens": "--n-predict --predict --num-predict --max-new-tokens --max-length",
    "--max-context": "--ctx-size --num-ctx --max-kv-size -c",
    "--keep-first": "--keep",
    "--prompt-file": "--file",
    "--system": "--system-prompt -sys",
    "--seed": "-s",
    "--repetition-penalty": "--repeat-penalty",
    "--typical-p": "--typical",
    "--stop": "--reverse-prompt --stop-sequence --extra-eos-token",
    "--kv-dtype": "--cache-type-k --cache-type-v --kv-bits",
    "--device": "--gpu-layers --n-gpu-layers",
    "--draft-model": "--model-draft",
    "--grammar": "--grammar-file",
    "--json-schema": "--schema --json-schema-file",
    "--prompt-cache": "--prompt-cache-file",
    "--stats": "--verbose",
    "--threads": "--num-threads",
    "--output": "--output-file",
    "kvgen chat": "--conversation --interactive",
}
_OWN_NAMES = {foreign: own for own, names in _FOREIGN_NAMES.items() for foreign in names.split()}


class Command(TyperCommand):
    """A command whose help is plain text."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _make_help_plain(self, ctx)
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """A group of commands whose help is plain text. Errors in a command become one line and an exit code."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _make_help_plain(self, ctx)
        for command in self.commands.values():
            command.help = _plain(command.help)
        super().format_help(ctx, formatter)

    def main(self, *args: Any, **options: Any) -> Any:
        prepare_stderr()
        words = [_OPTIONAL_VALUES.get(word, word) for word in sys.argv[1:]]
        code: Any = 0
        try:
            with exit_codes():
                prepare_stdout()
                code = super().main(words, *args, **{**options, "standalone_mode": False})
        except TyperException as error:  # wrong usage
            print_error(_explain(error))
            code = error.exit_code
        except Exit as exit_:
            code = exit_.exit_code
        code = code if isinstance(code, int) else 0
        try:
            with exit_codes(code):
                sys.stdout.flush()  # Python's own flush at exit could not report an error
        except Exit as exit_:
            code = exit_.exit_code
        if code == EXIT_INTERRUPTED:
            exit_now(code)
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        with exit_codes(show_traceback=bool(ctx.find_root().params.get("traceback"))):
            return super().invoke(ctx)


class Commands(Mapping[str, Any]):
    """Commands of one group by name, each made when it is asked for: making all takes as long as a warm answer.

    A command is the function, or the Typer group, that the module of its name has in `kvgen.cli`. examples: by name,
    the lines at the end of the command's help.
    """

    def __init__(self, examples: Mapping[str, Sequence[str]]) -> None:
        self._examples = examples
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            examples = self._examples[name]
            command = getattr(import_module(f"kvgen.cli.{name}"), name)
            if not isinstance(command, Typer):
                alone = Typer(add_completion=False)
                alone.command(cls=Command, epilog="\n\n".join(("Examples:", *examples)))(command)
                command = alone
            self._made[name] = get_command(command)
            self._made[name].name = name
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._examples)

    def __len__(self) -> int:
        return len(self._examples)


def _make_help_plain(command: Any, context: Any) -> None:
    command.help, command.epilog = _plain(command.help), _plain(command.epilog)
    for parameter in command.get_params(context):
        parameter.help = _plain(parameter.help)
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""  # instead of <bool>


def _plain(text: str | None) -> str | None:
    """Join the lines of each paragraph, which Typer would keep apart, and escape brackets, which are Rich markup."""
    from rich.markup import escape  # here, because Rich takes time that commands would spend in vain

    return text and "\n\n".join(escape(" ".join(paragraph.split())) for paragraph in text.split("\n\n"))


def _explain(error: TyperException) -> str:
    """Describe wrong usage: what is wrong, which file or variable set the value, and where to look."""
    context = getattr(error, "ctx", None)
    if context is None:
        return error.format_message()
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):  # an unknown option
        hint = _hint(option, context)
        if hint is not None:
            return f"no option {option}: {hint}"
    name = getattr(getattr(error, "param", None), "name", None)
    source = name and context.get_parameter_source(name)
    origin = ""
    if source is not None and source.name == "DEFAULT_MAP":
        settings = context.obj["settings"]
        origin = f", in {[s.source for s in settings if s.name == name and s.command in ('', context.info_name)][-1]}"
    return f"{error.format_message()}{origin} (see '{context.command_path} --help')"


def _hint(option: str, context: Any) -> str | None:
    """Name the option to use instead of an unknown one; None if there is no candidate."""
    if option in ("--profile", "--traceback"):
        program, _, rest = context.command_path.partition(" ")
        value = " NAME" if option == "--profile" else ""
        return f"it goes before the command, as in {program} {option}{value} {rest} ..."
    option = option.replace("_", "-")
    option = _OWN_NAMES.get(option, option)
    known = {name for parameter in context.command.params for name in parameter.opts}
    return f"use {option}" if option in {*known, "kvgen chat"} else None
