"""`kvgen score`: how likely a text is to a model, as a whole and token by token."""

from __future__ import annotations

import contextlib
import json as json_library
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer import Argument, Option

from kvgen.cli import options
from kvgen.cli.escape import escape_controls
from kvgen.cli.model import load_model
from kvgen.cli.prompts import read_file, read_prompts
from kvgen.cli.render import terminal, write_json
from kvgen.errors import UsageError

if TYPE_CHECKING:
    from kvgen import Loaded, Score, Tokenizer

_WHAT = "What to score"
# Up to so many bits of surprise, and the colour of the ground: from calm to hot.
_HEAT = ((1.0, 22), (2.0, 64), (4.0, 100), (7.0, 136), (10.0, 130), (14.0, 124), (math.inf, 160))
_MOST_MAPPED = 4000  # tokens: a screen cannot hold more


def score(
    text: Annotated[Path | None, Argument(metavar="[FILE]", help="The text; - is stdin.", show_default="stdin")] = None,
    prompt: Annotated[str | None, Option("--prompt", "-p", help="The text itself.", rich_help_panel=_WHAT)] = None,
    jsonl: Annotated[
        bool,
        Option(
            "--jsonl",
            help='Each line is a text of its own: {"text": "..."}, or a string. Other fields are passed through.',
            rich_help_panel=_WHAT,
        ),
    ] = False,
    window: Annotated[
        int | None,
        Option(min=2, help="Tokens at once.", show_default="the context, at most 2048", rich_help_panel=_WHAT),
    ] = None,
    stride: Annotated[
        int | None,
        Option(min=1, help="Tokens from window to window.", show_default="half a window", rich_help_panel=_WHAT),
    ] = None,
    model: options.Model = None,
    tokenizer: options.TokenizerFile = None,
    ids: options.Ids = False,
    backend: options.Backend = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    tokens: Annotated[bool, Option("--tokens", help="A line, or in JSON an entry, for each token.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Log-likelihood and perplexity of a text. On a terminal, with a map of how surprising each token is.

    Log-likelihoods are in nats, surprise is in bits. The first token is given, and not scored.
    """
    if prompt is not None and (text is not None or jsonl):
        raise UsageError("give --prompt, or a file, not both; --jsonl reads a file")
    texts = list(_texts(prompt, text, jsonl=jsonl))
    loaded = load_model(model, dtype, device, threads, "ids" if ids else tokenizer, backend=backend, quiet=quiet)
    for fields in texts:
        result = _score(loaded, fields["text"], window, stride, quiet=quiet)
        if json or jsonl:
            write_json(fields | _as_data(result, loaded.tokenizer, tokens=tokens))
        else:
            _print(result, loaded.tokenizer, tokens=tokens)


def _texts(prompt: str | None, file: Path | None, *, jsonl: bool) -> Iterator[dict[str, Any]]:
    """Objects with at least a `text`. Raises UsageError, with its number, for a line that is none."""
    if not jsonl:
        yield {"text": read_file(file) if file is not None else next(read_prompts(prompt, None, lines=False))}
        return
    for number, line in enumerate(read_prompts(None, file, lines=True), start=1):
        try:
            value = json_library.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"line {number}: not JSON ({error})") from None
        fields = {"text": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise UsageError(f'line {number}: give {{"text": "..."}} or a string')
        yield fields


def _score(loaded: Loaded, text: str, window: int | None, stride: int | None, *, quiet: bool) -> Score:
    from kvgen import score as score_ids

    with _progress(quiet=quiet) as progress:
        return score_ids(loaded.model, loaded.tokenizer.encode(text), window=window, stride=stride, progress=progress)


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("scoring"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal(sys.stderr), transient=True) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _as_data(score: Score, tokenizer: Tokenizer, *, tokens: bool) -> dict[str, Any]:
    data: dict[str, Any] = {
        "log_likelihood": score.total,
        "tokens": score.count,
        "perplexity": score.perplexity,
        "window": score.window,
        "stride": score.stride,
    }
    if tokens:
        data["logprobs"] = [
            {"id": id_, "token": tokenizer.token(id_), "logprob": logprob}
            for id_, logprob in zip(score.ids, score.logprobs, strict=True)
        ]
    return data


def _print(score: Score, tokenizer: Tokenizer, *, tokens: bool) -> None:
    console = terminal(sys.stdout)
    if tokens:
        for id_, logprob in zip(score.ids, score.logprobs, strict=True):
            bits = "-" if logprob is None else f"{-logprob / math.log(2):.2f}"
            shown = escape_controls(tokenizer.token(id_)).replace("\n", "\\n").replace("\t", "\\t")
            sys.stdout.write(f"{'-' if logprob is None else f'{logprob:.4f}':>10}{bits:>8}{id_:>8}  {shown}\n")
    elif console.is_terminal:
        console.print(_heat_map(score, tokenizer))
        console.print(_legend())
    sys.stdout.write(
        f"log-likelihood {score.total:.4f} nats, {score.count} tokens, perplexity {score.perplexity:.4f} "
        f"(windows of {score.window} tokens, stride {score.stride})\n"
    )


def _heat_map(score: Score, tokenizer: Tokenizer) -> Text:
    """The text, each piece on the colour of its surprise. Tokens that make one character share it."""
    heat, stream, pending = Text(), tokenizer.detokenizer(), 0.0
    shown = list(zip(score.ids, score.logprobs, strict=True))[:_MOST_MAPPED]
    for id_, logprob in shown:
        pending += 0.0 if logprob is None else -logprob / math.log(2)
        if piece := stream.add(id_):
            heat.append(escape_controls(piece), _style(pending))
            pending = 0.0
    heat.append(escape_controls(stream.flush()), _style(pending))
    if len(score.ids) > len(shown):
        heat.append(f"\n... and {len(score.ids) - len(shown)} more tokens", "dim")
    return heat


def _legend() -> Text:
    legend, lower = Text("bits of surprise: "), 0.0
    for upper, colour in _HEAT:
        label = f" {lower:g}-{upper:g} " if math.isfinite(upper) else f" over {lower:g} "
        legend.append(label, f"white on color({colour})").append(" ")
        lower = upper
    return legend


def _style(bits: float) -> str:
    colour = next(colour for upper, colour in _HEAT if bits <= upper)
    return f"white on color({colour})"
