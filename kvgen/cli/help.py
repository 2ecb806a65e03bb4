"""How commands explain themselves: texts of help are plain words, in whatever way Typer would show them."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command with plain help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _make_plain(self, ctx)
        super().format_help(ctx, formatter)


class HelpfulGroup(TyperGroup):
    """A group of commands with plain help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _make_plain(self, ctx)
        for command in self.commands.values():
            command.help = _plain(command.help)
        super().format_help(ctx, formatter)


def _make_plain(command: Any, context: Any) -> None:
    command.help, command.epilog = _plain(command.help), _plain(command.epilog)
    for parameter in command.get_params(context):
        parameter.help = _plain(parameter.help)
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""  # not <bool>: a flag takes no value


def _plain(text: str | None) -> str | None:
    """A paragraph in one piece, which Typer breaks where the source does, and brackets as brackets: not as markup."""
    return text and "\n\n".join(escape(" ".join(paragraph.split())) for paragraph in text.split("\n\n"))
