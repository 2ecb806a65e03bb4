"""`kvgen score`: log-likelihood and perplexity of texts."""

from __future__ import annotations

import json as json_library
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from kvgen.cli import options
from kvgen.cli.groups import ModelOptions, takes_groups
from kvgen.cli.prompts import GivenPrompt, read_file, read_prompts
from kvgen.cli.remote import connected
from kvgen.cli.render import count_progress, terminal, write_json
from kvgen.cli.stats import format_tokens
from kvgen.errors import KvgenError, ServerError, UsageError, as_kvgen_error
from kvgen.generation.counts import finite

if TYPE_CHECKING:
    from kvgen import Score, Tokenizer
    from kvgen.client.remote import RemoteTokenizer

    AnyTokenizer = Tokenizer | RemoteTokenizer

_option = partial(Option, rich_help_panel="What to score")


@takes_groups()
def score(
    *,
    text: Annotated[
        Path | None, Argument(metavar="FILE", help="File with the text; - is stdin.", show_default="stdin")
    ] = None,
    prompt: Annotated[str | None, _option("--prompt", "-p", help="Text to score.")] = None,
    prompt_file: Annotated[Path | None, _option("--prompt-file", "-f", help="The same as FILE.")] = None,
    jsonl: Annotated[
        bool,
        _option(
            "--jsonl",
            help='Score one text per line, {"text": "..."} or a string, and write one JSON result per line. Other '
            "fields are copied to the result.",
        ),
    ] = False,
    window: Annotated[
        int | None, _option(min=2, help="Tokens per window.", show_default="the context length, at most 2048")
    ] = None,
    stride: Annotated[
        int | None, _option(min=1, help="Tokens from window to window.", show_default="half a window")
    ] = None,
    source: ModelOptions,
    server: options.Server = None,
    tokens: Annotated[bool, Option("--tokens", help="Show each token, as a line or JSON entry.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compute the log-likelihood and perplexity of a text. On a terminal, colour it by how surprising each token is.

    Log-likelihoods are in nats, surprise is in bits. The first token has no context and is not scored.
    """
    if text is not None and prompt_file is not None:
        raise UsageError("give the text once: as FILE or with --prompt-file")
    text = prompt_file if text is None else text
    if prompt is not None and (text is not None or jsonl):
        raise UsageError("give --prompt or a file, not both; --jsonl reads a file")
    if prompt is None and text is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("no text: give a FILE or --prompt TEXT, or pipe text in")
    run = partial(_score, window=window, stride=stride, quiet=quiet)
    load = partial(_connect, server, source) if server else partial(_load, source, quiet=quiet)
    if jsonl:
        _score_lines(text, load, run, tokens=tokens)
        return
    whole = read_file(text or Path("-")) if prompt in (None, "-") else prompt
    if not whole:
        raise UsageError("the text is empty")
    engine = load()
    result, bits = run(engine, whole)
    if json:
        write_json({"text": whole} | _as_data(result, bits, engine.tokenizer, tokens=tokens))
    else:
        _print_score(result, bits, engine.tokenizer, tokens=tokens)


@dataclass(frozen=True)
class _Engine:
    """score: `kvgen.score` for a model, here or on a server. ids: whether texts are token ids."""

    score: Callable[..., Score]
    tokenizer: AnyTokenizer
    ids: bool


def _load(source: ModelOptions, *, quiet: bool) -> _Engine:
    loaded = source.load(quiet=quiet)

    from kvgen.generation.scoring import score

    return _Engine(partial(score, loaded), loaded.tokenizer, source.ids)


def _connect(server: str, source: ModelOptions) -> _Engine:
    remote = connected(server, source)
    return _Engine(remote.score, remote.tokenizer, remote.ids)


def _score(
    engine: _Engine, text: str, *, window: int | None, stride: int | None, quiet: bool
) -> tuple[Score, float | None]:
    """Return the score and its bits per byte; None for token ids and for special tokens alone, which have no bytes."""
    with count_progress("scoring", quiet=quiet) as progress:
        result = engine.score(text, window=window, stride=stride, progress=progress)
    if engine.ids or not text:
        return result, None
    ordinary = sum(id_ not in engine.tokenizer.special_ids for id_ in result.ids)
    return result, result.bits_per_byte(ordinary, len(text.encode()))


def _score_lines(
    file: Path | None,
    load: Callable[[], _Engine],
    run: Callable[[_Engine, str], tuple[Score, float | None]],
    *,
    tokens: bool,
) -> None:
    """Write a line of JSON for each line. Invalid lines get an error; the others continue."""
    engine: _Engine | None = None
    count = failed = 0
    for line in read_prompts(None, file, lines=True):
        engine = engine or load()
        count += 1
        fields: dict[str, Any] = {}
        try:
            fields = _parse_line(line)
            result, bits = run(engine, fields["text"])
            found = _as_data(result, bits, engine.tokenizer, tokens=tokens)
        except ServerError:
            raise
        except Exception as error:  # noqa: BLE001 (any error belongs to this line alone)
            failed += 1
            found = {"error": f"{line.where}: {as_kvgen_error(error)}"}
        write_json(fields | found)
    if failed:
        raise KvgenError(f"{failed} of {count} lines failed: see `error` in their results")


def _parse_line(line: GivenPrompt) -> dict[str, Any]:
    """Return the object of a line, which has a `text`. Raises UsageError for other lines."""
    if line.error is not None:
        raise line.error
    try:
        value = json_library.loads(line.text)
        # Python reads NaN, infinity and lone surrogates, but they could not be written as JSON.
        json_library.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({error})") from None
    fields = {"text": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise UsageError('give {"text": "..."} or a string')
    return fields


def _as_data(score: Score, bits: float | None, tokenizer: AnyTokenizer, *, tokens: bool) -> dict[str, Any]:
    data: dict[str, Any] = {
        "log_likelihood": finite(score.total),
        "tokens": score.count,
        "perplexity": finite(score.perplexity),
        "bits_per_byte": finite(bits),
        "window": score.window,
        "stride": score.stride,
    }
    if tokens:
        data["logprobs"] = [
            {"id": id_, "token": tokenizer.token(id_), "logprob": finite(logprob)}
            for id_, logprob in zip(score.ids, score.logprobs, strict=True)
        ]
    return data


def _print_score(score: Score, bits: float | None, tokenizer: AnyTokenizer, *, tokens: bool) -> None:
    if tokens:
        from kvgen.cli.surprise import table

        sys.stdout.writelines(f"{line}\n" for line in table(score, tokenizer))
    elif sys.stdout.isatty():
        from kvgen.cli.surprise import heat_map, legend

        console = terminal(sys.stdout)
        coloured = console.color_system is not None and not console.no_color
        console.print(heat_map(score, tokenizer, coloured=coloured))
        console.print(legend(coloured=coloured))
    sys.stdout.write(
        f"log-likelihood {score.total:.4f} nats, {format_tokens(score.count)}, perplexity {score.perplexity:.6g}"
        f"{'' if bits is None else f', {bits:.4f} bits per byte'}"
        f" (windows of {score.window} tokens, stride {score.stride})\n"
    )
