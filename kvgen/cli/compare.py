"""`kvgen compare`: check a model's KV cache against uncached decoding."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from kvgen.cli import options
from kvgen.cli.compare_url import ServerOptions, compare_url
from kvgen.cli.errors import exiting_with
from kvgen.cli.groups import EngineChoice, ModelOptions, takes_groups
from kvgen.cli.prompts import read_file
from kvgen.cli.render import check_file, check_page, status, write_file, write_json
from kvgen.errors import UsageError

if TYPE_CHECKING:
    from kvgen import Loaded
    from kvgen.comparison.comparison import Comparison
    from kvgen.comparison.crosscheck import CrossCheck

_option = partial(Option, rich_help_panel="What to compare")
_DEFAULT_PROMPT = "Once upon a time,"
_PATTERNS = ("batched", "last-token", "stale-chunk", "wrong-offset", "left-pad-ignored")  # repeated: importing is slow
_SERVER_STEPS = 8  # for --url, where each request repeats them
_TEXT_PROMPT_TOKENS = 8  # prompt length for --text, or half of a shorter text


def complete_pattern(incomplete: str) -> list[str]:
    """Complete names of patterns in the shell."""
    return [name for name in _PATTERNS if name.startswith(incomplete)]


@takes_groups()
def compare(
    *,
    wrong_pattern: Annotated[
        bool, _option("--wrong-pattern", help="Add the wrong pattern: after the prompt, pass only the last token.")
    ] = False,
    pattern: Annotated[
        list[str] | None,
        _option(
            metavar="NAME",
            help=f"Add a pattern: {_PATTERNS[0]}, which should be right, or a wrong one: {', '.join(_PATTERNS[1:])}. "
            "Repeatable.",
            autocompletion=complete_pattern,
        ),
    ] = None,
    prompt: Annotated[
        str | None, _option("--prompt", "-p", help="Prompt to complete.", show_default=_DEFAULT_PROMPT)
    ] = None,
    prompt_file: Annotated[Path | None, _option("--prompt-file", "-f", help="File with one prompt per line.")] = None,
    text: Annotated[
        Path | None, _option(metavar="FILE", help="Feed this text instead of the model's own completion.")
    ] = None,
    max_tokens: Annotated[int, _option("--max-tokens", "-n", min=2, help="Number of steps to compare.")] = 32,
    thorough: Annotated[
        bool,
        _option(
            "--thorough",
            help="Also try long texts, every window, many chunk sizes, edits far back, saved caches, padding and more "
            "rows. Takes half a minute for the default model, minutes for larger ones.",
        ),
    ] = False,
    source: ModelOptions,
    engine: EngineChoice,
    running: ServerOptions,
    json: options.Json = False,
    html: options.Html = None,
    junit: Annotated[
        Path | None,
        Option(
            metavar="FILE", rich_help_panel="Output", help="Write a JUnit XML report: a test for each use of the cache."
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Check that cached decoding gives the same logits as uncached decoding, or show where and why it does not.

    The right pattern, full-sequence, passes the whole sequence and the previous cache on each call; the model finds
    what is new. The exit code is 0 if it is equivalent to uncached decoding or declared lossy, else 1. Wrong patterns
    do not count; a library given by --reference does, if it differs by more than rounding.
    """
    running.check()
    if running.url is not None:
        if html is not None:
            raise UsageError("--html does not apply to --url: the page shows logits of steps; use --json or --junit")
        refused = source != ModelOptions() or engine != EngineChoice()
        if refused or any((wrong_pattern, pattern, prompt_file)):
            raise UsageError("--url compares what the server serves: options of models and patterns do not apply")
        start, steps = read_file(text) if text else prompt or _DEFAULT_PROMPT, min(max_tokens, _SERVER_STEPS)
        compare_url(running, start, steps=steps, thorough=thorough, json=json, junit=junit, quiet=quiet)
    names = ["full-sequence", *(["last-token"] if wrong_pattern else []), *(pattern or [])]
    texts = _read_texts(prompt, prompt_file, text, ids=source.ids)
    if html is not None:
        check_page(html)
    if junit is not None:
        check_file("--junit", junit)
    loaded = engine.load(source, quiet=quiet)
    reference = engine.load_reference(source, quiet=quiet)

    from kvgen.comparison.report import as_data

    with status("comparing", loaded.model, quiet=quiet) as show:
        chosen: dict[str, Any] = {"patterns": names, "steps": max_tokens, "thorough": thorough}
        chosen["progress"] = lambda name, number, count: show(f"comparing: {name} ({number + 1} of {count})")
        comparisons = [_compare(loaded, given, forced=text is not None, **chosen) for given in texts]
        checks = [_cross_check(loaded, reference, *pair) for pair in zip(comparisons, texts, strict=True)]
    report: dict[str, Any] = {
        "model": loaded.source,
        "backend": loaded.model.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "acceptable": all(comparison.acceptable for comparison in comparisons)
        and all(check.acceptable for check in checks if check is not None),
        "comparisons": [
            as_data(comparison, loaded.tokenizer, check) for comparison, check in zip(comparisons, checks, strict=True)
        ],
    }
    if html is not None:
        from kvgen.pages import render_comparison

        write_file("--html", html, render_comparison(report))
    if junit is not None:
        from kvgen.comparison.junit import as_junit

        write_file("--junit", junit, as_junit(report))
    with exiting_with(0 if report["acceptable"] else 1):
        if json:
            write_json(report)
        else:
            from kvgen.cli.report import print_comparison

            for data in report["comparisons"]:
                print_comparison(data, report)


def _read_texts(prompt: str | None, prompt_file: Path | None, text: Path | None, *, ids: bool) -> list[str]:
    if sum(source is not None for source in (prompt, prompt_file, text)) > 1:
        raise UsageError("give one of --prompt, --prompt-file and --text")
    if text is not None:
        return [read_file(text)]
    if prompt_file is not None:
        prompts = [line for line in read_file(prompt_file).splitlines() if line.strip()]
        if not prompts:
            raise UsageError(f"--prompt-file {prompt_file}: the file has no prompts")
        return prompts
    if prompt is None and ids:
        raise UsageError('--ids needs --prompt with token ids, as in --prompt "5 17 3"')
    return [_DEFAULT_PROMPT if prompt is None else prompt]


def _compare(loaded: Loaded, text: str, *, forced: bool, **chosen: Any) -> Comparison:
    """Compare on a completion of `text`, or if `forced` on the text itself, split into prompt and continuation."""
    from kvgen.comparison import compare as compare_patterns

    prompt, continuation = loaded.tokenizer.encode(text), None
    if forced:
        cut = min(_TEXT_PROMPT_TOKENS, len(prompt) // 2)
        if len(prompt) - cut < 2 or not cut:
            raise UsageError("--text must hold at least three tokens")
        prompt, continuation = prompt[:cut], prompt[cut:]
    return compare_patterns(loaded, prompt, continuation=continuation, **chosen)


def _cross_check(loaded: Loaded, reference: Loaded | None, comparison: Comparison, text: str) -> CrossCheck | None:
    from kvgen.comparison.crosscheck import cross_check

    return None if reference is None else cross_check(loaded, reference, comparison.ids, comparison.start, text)
