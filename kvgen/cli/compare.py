"""`kvgen compare`: is this model's KV cache right, and if not, where and why?"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from kvgen.cli import options
from kvgen.cli.errors import exiting_with
from kvgen.cli.groups import takes_groups
from kvgen.cli.model import ModelOptions
from kvgen.cli.prompts import read_file
from kvgen.cli.render import check_page, terminal, write_json, write_page
from kvgen.cli.report import print_comparison
from kvgen.errors import UsageError

if TYPE_CHECKING:
    from kvgen import Loaded
    from kvgen.comparison.comparison import Comparison

_WHAT = "What to compare"
_DEFAULT_PROMPT = "Once upon a time,"
_PATTERNS = ("batched", "last-token", "stale-chunk", "wrong-offset", "left-pad-ignored")  # known without torch
_TEXT_PROMPT_TOKENS = 8  # of --text that are handed over at once, if it is long enough


def complete_pattern(incomplete: str) -> list[str]:
    """Names of patterns, for the shell's completion."""
    return [name for name in _PATTERNS if name.startswith(incomplete)]


@takes_groups(backend="library")
def compare(
    *,
    wrong_pattern: Annotated[
        bool,
        Option(
            "--wrong-pattern",
            help="Add the wrong pattern: after the prompt, the last token only.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    pattern: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help=f"Add a pattern: {_PATTERNS[0]}, which must be right too; or {', '.join(_PATTERNS[1:])}. Repeatable.",
            autocompletion=complete_pattern,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        Option("--prompt", "-p", help="The text to begin with.", show_default=_DEFAULT_PROMPT, rich_help_panel=_WHAT),
    ] = None,
    prompt_file: Annotated[
        Path | None, Option("--prompt-file", "-f", help="Several prompts, one a line.", rich_help_panel=_WHAT)
    ] = None,
    text: Annotated[
        Path | None,
        Option(metavar="FILE", help="Force every pattern along this text, not the model's own.", rich_help_panel=_WHAT),
    ] = None,
    max_tokens: Annotated[
        int, Option("--max-tokens", "-n", min=2, help="Steps to compare.", rich_help_panel=_WHAT)
    ] = 32,
    source: ModelOptions,
    json: options.Json = False,
    html: options.Html = None,
    quiet: options.Quiet = False,
) -> None:
    """Prove that cached decoding equals uncached decoding on this model, or show where and why it does not.

    The right pattern is called full-sequence: each call gets the whole text and the cache of the call before, and the
    model finds what is new. Exit code 0 when it is equivalent to uncached decoding, whatever wrong patterns do; 1 when
    it is not.
    """
    names = ["full-sequence", *(["last-token"] if wrong_pattern else []), *(pattern or [])]
    texts = _texts(prompt, prompt_file, text, ids=source.ids)
    if html is not None:
        check_page(html)
    loaded = source.load(quiet=quiet)
    comparisons = [
        _compare(loaded, prompt_text, names, max_tokens, forced=text is not None, quiet=quiet) for prompt_text in texts
    ]
    report = _as_data(loaded, comparisons)
    if html is not None:
        from kvgen.pages.comparison import render_html

        write_page(html, render_html(report))
    with exiting_with(0 if report["acceptable"] else 1):
        if json:
            write_json(report)
        else:
            for data in report["comparisons"]:
                print_comparison(data, report)


def _texts(prompt: str | None, prompt_file: Path | None, text: Path | None, *, ids: bool) -> list[str]:
    if sum(source is not None for source in (prompt, prompt_file, text)) > 1:
        raise UsageError("give one of --prompt, --prompt-file and --text")
    if text is not None:
        return [read_file(text)]
    if prompt_file is not None:
        return [line for line in read_file(prompt_file).splitlines() if line.strip()]
    if prompt is None and ids:
        raise UsageError('--ids needs --prompt with token ids, as in --prompt "5 17 3"')
    return [_DEFAULT_PROMPT if prompt is None else prompt]


def _compare(loaded: Loaded, text: str, names: Sequence[str], steps: int, *, forced: bool, quiet: bool) -> Comparison:
    from kvgen.comparison import compare as compare_patterns

    prompt = loaded.tokenizer.encode(text)
    continuation = None
    if forced:
        cut = min(_TEXT_PROMPT_TOKENS, len(prompt) // 2)
        if len(prompt) - cut < 2 or not cut:
            raise UsageError("--text must hold at least three tokens")
        prompt, continuation = prompt[:cut], prompt[cut:]
    with _waiting(quiet=quiet):
        return compare_patterns(loaded, prompt, patterns=names, steps=steps, continuation=continuation)


@contextlib.contextmanager
def _waiting(*, quiet: bool) -> Iterator[None]:
    if quiet or not sys.stderr.isatty():
        yield
    else:
        with terminal(sys.stderr).status("comparing"):
            yield


def _as_data(loaded: Loaded, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    from kvgen.comparison.report import as_data

    return {
        "model": loaded.source,
        "backend": loaded.model.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "acceptable": all(comparison.acceptable for comparison in comparisons),
        "comparisons": [as_data(comparison, loaded.tokenizer) for comparison in comparisons],
    }
