"""Formatted text on a terminal while it grows: each line is written once, and only what can still change is redrawn."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from kvgen.cli.escape import escape_controls

_BELOW = 1  # lines that stay free, so that what is redrawn never scrolls


class MarkdownWriter:
    """Streams Markdown to a terminal. A context: on leaving it, however that happens, all of the text is there.

    Blocks (paragraphs, lists, code) that are whole are written for good. Of the last one, which may still grow, as many
    lines are redrawn as the screen has room for.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._text, self._has_written = console, "", False
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> MarkdownWriter:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update("")
        self._live.stop()
        self._settle(self._text)

    def write(self, text: str) -> None:
        self._text += escape_controls(text)
        start = _start_of_last_block(self._text)
        if start:
            self._live.update("", refresh=True)
            self._settle(self._text[:start])
            self._text = self._text[start:]
        self._live.update(_Block(self._text, most=max(1, self._console.height - _BELOW)), refresh=True)

    def _settle(self, blocks: str) -> None:
        if not blocks.strip():
            return
        if self._has_written:
            self._console.print()
        self._console.print(_Block(blocks))
        self._has_written = True


class _Block:
    """The lines of a piece of Markdown, without blank ones around; the last ones if there are more than `most`.

    Links are shown as text: a terminal would hide where they lead.
    """

    def __init__(self, text: str, most: int | None = None) -> None:
        self._text, self._most = text, most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        markdown = Markdown(self._text, hyperlinks=False)
        lines = console.render_lines(markdown, options.update(height=None), pad=False)
        while lines and _is_blank(lines[0]):
            del lines[0]
        while lines and _is_blank(lines[-1]):
            del lines[-1]
        for line in lines if self._most is None else lines[-self._most :]:
            yield from line
            yield Segment.line()


def _is_blank(line: list[Segment]) -> bool:
    return not any(segment.text.strip() for segment in line)


def _start_of_last_block(text: str) -> int:
    """Where the last block of Markdown begins; what is before it cannot change any more."""
    lines = [token.map[0] for token in Markdown(text).parsed if token.level == 0 and token.map]
    return sum(map(len, text.splitlines(keepends=True)[: lines[-1]])) if lines else 0
