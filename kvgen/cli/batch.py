"""`kvgen batch`: complete many JSONL rows side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Exit, Option

from kvgen.cli import options
from kvgen.cli.errors import EXIT_INTERRUPTED
from kvgen.cli.groups import CompletionOptions, ModelOptions, PromptOptions, takes_groups
from kvgen.cli.interrupts import ending_softly
from kvgen.cli.prompts import open_lines
from kvgen.cli.remote import connected
from kvgen.cli.render import notes, parse_bytes, print_note, row_progress, write_json
from kvgen.cli.stats import Totals
from kvgen.errors import KvgenError, UsageError
from kvgen.generation.settings import DEFAULT_BATCH_SIZE, Request

if TYPE_CHECKING:
    from kvgen.contract import Backend
    from kvgen.pipeline.complete import Result
    from kvgen.pipeline.results import ResultsFile
    from kvgen.pipeline.rows import InputRow

    _Complete = Callable[[Callable[[], bool]], Iterator[Result]]

_option = partial(Option, rich_help_panel="Rows")


@takes_groups()
def batch(
    *,
    context: Context,
    rows: Annotated[
        Path | None, Argument(metavar="FILE", help="JSONL file with the rows; - is stdin.", show_default="stdin")
    ] = None,
    output: Annotated[
        Path | None,
        _option("--output", "-o", metavar="FILE", help="File for results; - is stdout.", show_default="stdout"),
    ] = None,
    resume: Annotated[bool, _option("--resume", help="Complete the rows that are not in --output yet.")] = False,
    retry_errors: Annotated[
        bool, _option("--retry-errors", help="With --resume: complete failed rows again; their new results come last.")
    ] = False,
    unordered: Annotated[bool, _option("--unordered", help="Write results as they finish, not in row order.")] = False,
    strict: Annotated[bool, _option("--strict", help="Stop at the first failed row.")] = False,
    batch_size: Annotated[int, _option(min=1, help="Maximum number of rows at a time.")] = DEFAULT_BATCH_SIZE,
    max_cache_memory: Annotated[
        str | None,
        _option(
            metavar="SIZE",
            help="Memory limit for the caches of all rows, as in 2GB.",
            show_default="half of what the weights leave",
        ),
    ] = None,
    ray: Annotated[
        str | None, _option(metavar="[=ADDRESS]", help="Run on this Ray cluster, or start a local one (extra: ray).")
    ] = None,
    ray_workers: Annotated[
        int | None, _option(min=1, help="With --ray: number of model copies.", show_default="one per node")
    ] = None,
    reading: PromptOptions,
    source: ModelOptions,
    server: options.Server = None,
    completion: CompletionOptions,
    prompt_cache: options.PromptCache = None,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
) -> None:
    """Complete many rows side by side: JSONL in, JSONL out, in the same order.

    A row is a string, or an object with "prompt" or "messages". It can also have an "id", "metadata" that is copied to
    the result, and settings such as "max_tokens" or "temperature". It gets the same tokens as it would alone. Its
    default seed is --seed plus its index. --max-tokens, if given, is the upper limit for every row.

    A failed row becomes a result with an error; the others continue, and the exit code is 1. Ctrl-C finishes the rows
    in progress; a second one stops at once. --resume continues with the same model and settings, which are stored in
    FILE.run.json.
    """
    reading.check(conversations=True)
    output = None if output == Path("-") else output
    if resume and output is None:
        raise UsageError("--resume needs --output FILE")
    if retry_errors and not resume:
        raise UsageError("--retry-errors needs --resume")
    if ray is not None and prompt_cache is not None:
        raise UsageError("--prompt-cache cannot be used with --ray")
    defaults = completion.request()
    max_cache_bytes = None if max_cache_memory is None else parse_bytes(max_cache_memory)

    from kvgen.pipeline.results import InOrder, Lines, ResultsFile, not_done
    from kvgen.pipeline.rows import read_rows

    lines = open_lines(rows)
    file = None if output is None else ResultsFile(output, resume=resume, retry_errors=retry_errors)
    if file is not None and file.record is not None and completion.seed is None:
        defaults = replace(defaults, sampling=replace(defaults.sampling, seed=file.record.get("seed")))
    limit = defaults.max_tokens if _is_given(context, "max_tokens") else None
    run = _Run(source, reading, defaults, limit, batch_size, max_cache_bytes, file, quiet)
    done, failed = ({}, 0) if file is None else (file.done, file.failed)
    todo = not_done(read_rows(lines), done, output)
    model: Backend | None = None
    if server:
        given = {"ray": ray, "prompt_cache": prompt_cache, "max_cache_memory": max_cache_memory}
        complete = run.complete_on_server(todo, server, [name for name, value in given.items() if value is not None])
    elif ray is None:
        complete, model = run.complete_locally(todo, prompt_cache)
    else:
        complete = run.complete_on_ray(todo, None if ray == "here" else ray, ray_workers)
    write = file.write if file else write_json if sys.stdout.isatty() else Lines(sys.stdout.fileno()).write
    if strict:
        write = partial(_write_strictly, write)
    expected = None if rows is None else _count_rows(rows, len(done))
    with ending_softly(quiet=quiet) as going_on:
        put = write if unordered else InOrder(write, done)
        with row_progress(expected, model, quiet=quiet) as show:
            totals = _write_results(complete(going_on), put, show, quiet=quiet)
        interrupted = not going_on()
    if file is not None:
        file.close()
    if stats and not quiet:
        print_note(str(totals))
    if interrupted:
        raise Exit(EXIT_INTERRUPTED)
    if resume and not totals.rows and not failed and not quiet:
        print_note(f"nothing to do: {output} has a result for every row")
    count, failed = totals.rows + len(done), totals.failed + failed
    if failed:
        hint = "" if file is None else "; --resume --retry-errors completes them again"
        if totals.not_json == count:
            hint = "; none is JSON: for a file with one prompt per line, use kvgen generate --lines"
        raise KvgenError(f"{failed} of {count} rows failed: see `error` in their results{hint}")


def _is_given(context: Context, name: str) -> bool:
    """Whether an option is set on the command line, in the environment or in the configuration file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@dataclass(frozen=True)
class _Run:
    """Settings of a run.

    max_tokens: upper limit for every row; None for no limit. max_cache_bytes: None for half of the remaining memory.
    """

    source: ModelOptions
    reading: PromptOptions
    defaults: Request
    max_tokens: int | None
    batch_size: int
    max_cache_bytes: int | None
    file: ResultsFile | None
    quiet: bool

    def complete_locally(self, rows: Iterable[InputRow], prompt_cache: Path | None) -> tuple[_Complete, Backend]:
        """Load the model in this process, and return it too."""
        from kvgen.pipeline.record import describe_model

        loaded = self.reading.prepared(self.source.load(quiet=self.quiet))
        self._claim_file(lambda: describe_model(self.source.arguments(), loaded))

        from kvgen import Batch
        from kvgen.generation.prompt_cache import open_prompt_cache, save_prompt_cache
        from kvgen.pipeline.complete import complete_rows

        cache = None if prompt_cache is None else open_prompt_cache(prompt_cache, loaded)
        budget = loaded.cache_budget if self.max_cache_bytes is None else self.max_cache_bytes
        engine = Batch(loaded, batch_size=self.batch_size, max_cache_bytes=budget, kept=[cache])

        def complete(going_on: Callable[[], bool]) -> Iterator[Result]:
            settings = self.defaults, self.reading.format, going_on, self.max_tokens
            yield from complete_rows(engine, loaded.tokenizer, rows, *settings)
            if prompt_cache is not None and engine.cache is not None:
                save_prompt_cache(prompt_cache, engine.cache, loaded)

        return complete, loaded.model

    def complete_on_ray(self, rows: Iterable[InputRow], address: str | None, workers: int | None) -> _Complete:
        """Load the model in each worker of a Ray cluster."""
        from kvgen.pipeline.record import describe_model

        self._claim_file(lambda: describe_model(self.source.arguments(), None))

        from kvgen.pipeline.ray import Work, complete_on_ray

        settings = self.defaults, self.reading.format, self.reading.template
        work = Work(self.source.arguments(), *settings, self.batch_size, self.max_cache_bytes, self.max_tokens)
        results = complete_on_ray(rows, work, address, workers, notes(quiet=self.quiet))
        return lambda going_on: takewhile(lambda result: going_on(), results)

    def complete_on_server(self, rows: Iterable[InputRow], server: str, refused: list[str]) -> _Complete:
        """Send the rows to a server. refused: options that were given in vain."""
        remote = self.reading.prepared(connected(server, self.source, refused))
        self._claim_file(remote.describe)

        from kvgen.pipeline.complete import complete_rows

        engine, settings = remote.batch(self.batch_size), (self.defaults, self.reading.format)
        return lambda going_on: complete_rows(engine, remote.tokenizer, rows, *settings, going_on, self.max_tokens)

    def _claim_file(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Claim the file of results, if there is one. describe: returns what `describe_model` does."""
        from kvgen.pipeline.record import run_record

        if self.file is not None:
            settings = self.defaults, self.reading.format, self.reading.template
            bounded = self.max_tokens is not None
            self.file.claim(run_record(describe(), *settings, max_tokens_bounds_rows=bounded))


def _write_results(
    results: Iterable[Result],
    put: Callable[[dict[str, Any]], None],
    show: Callable[[int], None],
    *,
    quiet: bool,
) -> Totals:
    totals = Totals()
    for result in results:
        try:
            put(result.value)
        except BrokenPipeError:
            if not quiet:
                print_note(f"stdout was closed after {totals.rows} rows")
            raise
        totals.add(result)
        show(result.tokens)
    return totals


def _write_strictly(write: Callable[[dict[str, Any]], None], value: dict[str, Any]) -> None:
    """Write a result. Raises KvgenError if its row failed."""
    write(value)
    if "error" in value:
        raise KvgenError(f"row {value['id']!r}: {value['error']}")


def _count_rows(file: Path, done: int) -> int | None:
    """Count the rows to complete; None for a pipe, which can be read only once."""
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip()) - done
