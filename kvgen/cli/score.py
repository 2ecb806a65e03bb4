"""`kvgen score`: how likely a text is to a model, as a whole and token by token."""

from __future__ import annotations

import itertools
import json as json_library
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from kvgen.cli import options
from kvgen.cli.groups import takes_groups
from kvgen.cli.model import ModelOptions
from kvgen.cli.prompts import GivenPrompt, read_file, read_prompts
from kvgen.cli.render import count_progress, terminal, write_json
from kvgen.cli.stats import format_tokens
from kvgen.cli.surprise import heat_map, legend, table
from kvgen.errors import KvgenError, UsageError, of_item

if TYPE_CHECKING:
    from kvgen import Loaded, Score, Tokenizer

_WHAT = "What to score"


@takes_groups()
def score(
    *,
    text: Annotated[Path | None, Argument(metavar="FILE", help="The text; - is stdin.", show_default="stdin")] = None,
    prompt: Annotated[str | None, Option("--prompt", "-p", help="The text itself.", rich_help_panel=_WHAT)] = None,
    prompt_file: Annotated[
        Path | None, Option("--prompt-file", "-f", help="The same as FILE.", rich_help_panel=_WHAT)
    ] = None,
    jsonl: Annotated[
        bool,
        Option(
            "--jsonl",
            help='Each line is a text of its own: {"text": "..."}, or a string; and so is each line of the output, '
            "in JSON. Other fields are passed through.",
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
    source: ModelOptions,
    tokens: Annotated[bool, Option("--tokens", help="A line, or in JSON an entry, for each token.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Log-likelihood and perplexity of a text. On a terminal, with a map of how surprising each token is.

    Log-likelihoods are in nats, surprise is in bits. The first token is given, and not scored.
    """
    if text is not None and prompt_file is not None:
        raise UsageError("give the text once: as FILE or with --prompt-file")
    text = prompt_file if text is None else text
    if prompt is not None and (text is not None or jsonl):
        raise UsageError("give --prompt, or a file, not both; --jsonl reads a file")
    if prompt is None and text is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("no text: give a FILE or --prompt TEXT, or pipe text in")
    if jsonl:
        _score_lines(text, source, window, stride, tokens=tokens, quiet=quiet)
        return
    whole = _whole(prompt, text)  # what is wrong with it shows before a model is loaded
    loaded = source.load(quiet=quiet)
    result = _score(loaded, whole, window, stride, quiet=quiet)
    size = None if source.ids else len(whole.encode())
    if json:
        write_json({"text": whole} | _as_data(result, loaded.tokenizer, size, tokens=tokens))
    else:
        _print(result, loaded.tokenizer, size, tokens=tokens)


def _score_lines(
    file: Path | None, source: ModelOptions, window: int | None, stride: int | None, *, tokens: bool, quiet: bool
) -> None:
    """A line of JSON for each; one that cannot be scored has an error in it, and the others go on."""
    lines = read_prompts(None, file, lines=True)
    first = next(lines, None)
    if first is None:
        return
    loaded = source.load(quiet=quiet)
    failed, count = 0, 0
    for line in itertools.chain([first], lines):
        fields: dict[str, Any] = {}
        count += 1
        try:
            fields = _fields(line)
            result = _score(loaded, fields["text"], window, stride, quiet=quiet)
            size = None if source.ids else len(fields["text"].encode())
            found = _as_data(result, loaded.tokenizer, size, tokens=tokens)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this line's, and the others go on)
            failed += 1
            found = {"error": f"{line.where}: {of_item(error)}"}
        write_json(fields | found)
    if failed:
        raise KvgenError(f"{failed} of {count} lines could not be scored: theirs have an `error`")


def _whole(prompt: str | None, file: Path | None) -> str:
    text = prompt if prompt not in (None, "-") else read_file(file or Path("-"))
    if not text:
        raise UsageError("the text is empty")
    return text


def _fields(line: GivenPrompt) -> dict[str, Any]:
    """The object of a line, with at least a `text`. Raises UsageError for a line that is none."""
    if line.error is not None:
        raise line.error
    try:
        value = json_library.loads(line.text)
        # Numbers that JSON does not have and halves of characters get in, but could not go out again.
        json_library.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({error})") from None
    fields = {"text": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise UsageError('give {"text": "..."} or a string')
    return fields


def _score(loaded: Loaded, text: str, window: int | None, stride: int | None, *, quiet: bool) -> Score:
    from kvgen.generation.scoring import score

    with count_progress("scoring", quiet=quiet) as progress:
        return score(loaded, text, window=window, stride=stride, progress=progress)


def _as_data(score: Score, tokenizer: Tokenizer, size: int | None, *, tokens: bool) -> dict[str, Any]:
    data: dict[str, Any] = {
        "log_likelihood": _finite(score.total),
        "tokens": score.count,
        "perplexity": _finite(score.perplexity),
        "bits_per_byte": _finite(_bits_per_byte(score, tokenizer, size)),
        "window": score.window,
        "stride": score.stride,
    }
    if tokens:
        data["logprobs"] = [
            {"id": id_, "token": tokenizer.token(id_), "logprob": _finite(logprob)}
            for id_, logprob in zip(score.ids, score.logprobs, strict=True)
        ]
    return data


def _finite(value: float | None) -> float | None:
    """A text that a model rules out has infinite surprise, and JSON no infinity."""
    return value if value is None or math.isfinite(value) else None


def _bits_per_byte(score: Score, tokenizer: Tokenizer, size: int | None) -> float | None:
    """None for a text that has no bytes: token ids, or BOS and EOS alone."""
    if not size:
        return None
    return score.bits_per_byte(sum(id_ not in tokenizer.special_ids for id_ in score.ids), size)


def _print(score: Score, tokenizer: Tokenizer, size: int | None, *, tokens: bool) -> None:
    console = terminal(sys.stdout)
    if tokens:
        sys.stdout.writelines(f"{line}\n" for line in table(score, tokenizer))
    elif console.is_terminal:
        coloured = console.color_system is not None and not console.no_color
        console.print(heat_map(score, tokenizer, coloured=coloured))
        console.print(legend(coloured=coloured))
    bits = _bits_per_byte(score, tokenizer, size)
    sys.stdout.write(
        f"log-likelihood {score.total:.4f} nats, {format_tokens(score.count)}, perplexity {score.perplexity:.6g}"
        f"{'' if bits is None else f', {bits:.4f} bits per byte'}"
        f" (windows of {score.window} tokens, stride {score.stride})\n"
    )
