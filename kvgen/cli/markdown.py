"""Formatted Markdown on a terminal while it grows: finished blocks are printed once, the last one is redrawn."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from kvgen.cli.render import escape_controls


class MarkdownWriter:
    """Context manager that streams Markdown to a terminal. On leaving, it prints all of the text.

    A finished block (paragraph, list, code) is printed for good. The last block may still grow, so as many of its lines
    as fit on the screen are redrawn.
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
        self._print(self._text)

    def write(self, text: str) -> None:
        self._text += escape_controls(text)
        starts = [token.map[0] for token in Markdown(self._text).parsed if token.level == 0 and token.map]
        start = sum(map(len, self._text.splitlines(keepends=True)[: starts[-1]])) if starts else 0
        if start:
            self._live.update("", refresh=True)
            self._print(self._text[:start])
            self._text = self._text[start:]
        # One line stays free, so that redrawn text never scrolls.
        self._live.update(_Block(self._text, max_lines=max(1, self._console.height - 1)), refresh=True)

    def _print(self, blocks: str) -> None:
        if not blocks.strip():
            return
        if self._has_written:
            self._console.print()
        self._console.print(_Block(blocks))
        self._has_written = True


class _Block:
    """Render Markdown without blank lines around it; only the last lines if there are more than `max_lines`.

    Links are shown as text, because a terminal would hide where they lead.
    """

    def __init__(self, text: str, max_lines: int | None = None) -> None:
        self._text, self._max_lines = text, max_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        markdown = Markdown(self._text, hyperlinks=False)
        lines = console.render_lines(markdown, options.update(height=None), pad=False)
        filled = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        lines = lines[filled[0] : filled[-1] + 1] if filled else []
        for line in lines if self._max_lines is None else lines[-self._max_lines :]:
            yield from line
            yield Segment.line()
