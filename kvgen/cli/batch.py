"""`kvgen batch`: complete many rows of JSONL side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Exit, Option

from kvgen.cli import options
from kvgen.cli.errors import EXIT_INTERRUPTED
from kvgen.cli.generation_options import CompletionOptions, PromptOptions
from kvgen.cli.groups import takes_groups
from kvgen.cli.interrupts import ending_softly
from kvgen.cli.model import ModelOptions
from kvgen.cli.prompts import open_lines
from kvgen.cli.render import notes, parse_bytes, print_note, row_progress, write_json
from kvgen.cli.stats import format_count
from kvgen.errors import KvgenError, UsageError
from kvgen.generation.counts import total
from kvgen.generation.settings import DEFAULT_BATCH_SIZE, Request

if TYPE_CHECKING:
    from kvgen import Loaded
    from kvgen.pipeline.complete import Result
    from kvgen.pipeline.results import ResultsFile
    from kvgen.pipeline.rows import InputRow

    _Complete = Callable[[Callable[[], bool]], Iterator[Result]]

_ROWS = "Rows"


@takes_groups()
def batch(
    *,
    context: Context,
    rows: Annotated[
        Path | None, Argument(metavar="FILE", help="The rows, in JSONL; - is stdin.", show_default="stdin")
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            "--output", "-o", metavar="FILE", help="Where results go.", show_default="stdout", rich_help_panel=_ROWS
        ),
    ] = None,
    resume: Annotated[
        bool,
        Option("--resume", help="Go on with --output: complete the rows that are not in it.", rich_help_panel=_ROWS),
    ] = False,
    retry_errors: Annotated[
        bool,
        Option(
            "--retry-errors",
            help="With --resume: complete rows again whose lines have an error; their new lines come last.",
            rich_help_panel=_ROWS,
        ),
    ] = False,
    unordered: Annotated[
        bool, Option("--unordered", help="Results as they come, not in the order of rows.", rich_help_panel=_ROWS)
    ] = False,
    strict: Annotated[
        bool, Option("--strict", help="Stop at a row that cannot be completed.", rich_help_panel=_ROWS)
    ] = False,
    batch_size: Annotated[
        int, Option(min=1, help="The most rows at a time.", rich_help_panel=_ROWS)
    ] = DEFAULT_BATCH_SIZE,
    max_cache_memory: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            help="The most that the caches of all rows may take, as in 2GB.",
            show_default="half of what the weights leave",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        Option(
            metavar="[=ADDRESS]",
            help="Complete on a Ray cluster, or on one that is started here (extra: ray).",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        Option(min=1, help="With --ray: models on the cluster.", show_default="one a node", rich_help_panel=_ROWS),
    ] = None,
    reading: PromptOptions,
    source: ModelOptions,
    completion: CompletionOptions,
    prompt_cache: options.PromptCache = None,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
) -> None:
    """Complete many rows side by side: JSONL in, JSONL out, in the order of the rows.

    A row is a string, or an object with "prompt" or "messages", and if it likes with "id", with "metadata" that is
    passed through, and with settings of its own, such as "max_tokens" or "temperature". It gets the tokens that it
    gets alone. Without a seed of its own it has --seed plus its index. --max-tokens, where it is given, bounds every
    row: one that asks for more gets so many.

    A row that cannot be completed gives a line with an error, and the others go on; the exit code is then 1. Ctrl-C
    lets the rows that are under way end, a second one stops at once; --resume goes on after either, with the model and
    the settings of before, which stand in FILE.run.json.
    """
    reading.check(conversations=True)
    if resume and output is None:
        raise UsageError("--resume goes with --output FILE")
    if retry_errors and not resume:
        raise UsageError("--retry-errors goes with --resume")
    if ray is not None and prompt_cache is not None:
        raise UsageError("--prompt-cache does not go with --ray")
    defaults = completion.request()
    how = _How(
        reading,
        defaults,
        defaults.max_tokens if _is_given(context, "max_tokens") else None,
        batch_size,
        None if max_cache_memory is None else parse_bytes(max_cache_memory),
    )

    from kvgen.pipeline.results import InOrder, Lines, ResultsFile, not_done
    from kvgen.pipeline.rows import read_rows

    lines = open_lines(rows)
    file = None if output is None else ResultsFile(output, resume=resume, retry_errors=retry_errors)
    if file is not None and file.record is not None and completion.seed is None:
        how = how.with_seed(file.record.get("seed"))
    write = file.write if file else write_json if sys.stdout.isatty() else Lines(sys.stdout.fileno()).write
    done, before = ({}, 0) if file is None else (file.done, file.failed)
    wanted = not_done(read_rows(lines), done, output)
    if ray is not None:
        complete = _on_ray(wanted, how, source, None if ray == "here" else ray, ray_workers, file, quiet=quiet)
    else:
        complete = _here(wanted, how, source, prompt_cache, file, quiet=quiet)
    with ending_softly(quiet=quiet) as going_on:
        totals = _write_all(
            complete(going_on),
            write if unordered else InOrder(write, done),
            None if rows is None else _count_rows(rows, len(done)),
            strict=strict,
            quiet=quiet,
        )
        interrupted = not going_on()
    if file is not None:
        file.close()
    if stats and not quiet:
        print_note(str(totals))
    if interrupted:
        raise Exit(EXIT_INTERRUPTED)
    if failed := totals.failed + before:
        hint = "" if file is None else "; --resume --retry-errors completes them again"
        count = totals.rows + len(done)
        if totals.not_json == count:
            hint = "; none is JSON: for a file with a prompt on each line there is kvgen generate --lines"
        raise KvgenError(f"{failed} of {count} rows could not be completed: their lines have an `error`{hint}")


def _is_given(context: Context, name: str) -> bool:
    """Whether an option was chosen, on the command line or in the configuration."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@dataclass(frozen=True)
class _How:
    """How rows are to be completed, wherever that is.

    most_tokens: that a row may ask for; None for any. max_cache_bytes: None for half of the memory that is left there.
    """

    reading: PromptOptions
    defaults: Request
    most_tokens: int | None
    batch_size: int
    max_cache_bytes: int | None

    def with_seed(self, seed: int | None) -> _How:
        return replace(self, defaults=replace(self.defaults, sampling=replace(self.defaults.sampling, seed=seed)))

    def claim(self, file: ResultsFile | None, source: ModelOptions, loaded: Loaded | None) -> None:
        """See `ResultsFile.claim`. loaded: None where the model is loaded elsewhere."""
        from kvgen.pipeline.record import run_record

        if file is not None:
            bounds = self.most_tokens is not None
            settings = self.defaults, self.reading.format, self.reading.template
            file.claim(run_record(source.arguments(), loaded, *settings, max_tokens_bounds_rows=bounds))


def _here(
    rows: Iterable[InputRow],
    how: _How,
    source: ModelOptions,
    prompt_cache: Path | None,
    file: ResultsFile | None,
    *,
    quiet: bool,
) -> _Complete:
    """On this machine, in this process."""
    loaded = how.reading.prepared(source.load(quiet=quiet))
    how.claim(file, source, loaded)

    from kvgen import Batch
    from kvgen.generation.prompt_cache import open_prompt_cache, save_prompt_cache
    from kvgen.pipeline.complete import complete_rows

    cache = None if prompt_cache is None else open_prompt_cache(prompt_cache, loaded)
    budget = loaded.cache_budget if how.max_cache_bytes is None else how.max_cache_bytes
    engine = Batch(loaded, batch_size=how.batch_size, max_cache_bytes=budget, cache=cache)

    def complete(going_on: Callable[[], bool]) -> Iterator[Result]:
        yield from complete_rows(
            engine, loaded.tokenizer, rows, how.defaults, how.reading.format, going_on, how.most_tokens
        )
        if prompt_cache is not None and engine.cache is not None:
            save_prompt_cache(prompt_cache, engine.cache, loaded)

    return complete


def _on_ray(
    rows: Iterable[InputRow],
    how: _How,
    source: ModelOptions,
    address: str | None,
    workers: int | None,
    file: ResultsFile | None,
    *,
    quiet: bool,
) -> _Complete:
    """On a Ray cluster, each worker with the model."""
    how.claim(file, source, None)

    from kvgen.pipeline.ray import Work, complete_on_ray

    arguments, reading = source.arguments(), how.reading
    sizes = how.batch_size, how.max_cache_bytes, how.most_tokens
    work = Work(arguments, how.defaults, reading.format, reading.template, *sizes)
    results = complete_on_ray(rows, work, address, workers, notes(quiet=quiet))
    return lambda going_on: takewhile(lambda result: going_on(), results)


def _write_all(
    results: Iterable[Result], put: Callable[[dict[str, Any]], None], total: int | None, *, strict: bool, quiet: bool
) -> Totals:
    """Write results as they come."""
    totals = Totals()
    with row_progress(total, quiet=quiet) as show:
        for result in results:
            try:
                put(result.value)
            except BrokenPipeError:
                if not quiet:
                    print_note(f"the reader has left after {totals.rows} rows")
                raise
            if result.failed and strict:
                raise KvgenError(f"row {result.row.id!r}: {result.value['error']}")
            totals.add(result)
            show(result.tokens)
    return totals


@dataclass
class Totals:
    """What a run did. not_json: how many of the rows that failed are no JSON."""

    rows: int = 0
    failed: int = 0
    not_json: int = 0
    tokens: int = 0
    reused: int | None = 0
    computed: int | None = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: Result) -> None:
        self.rows, self.failed, self.tokens = self.rows + 1, self.failed + result.failed, self.tokens + result.tokens
        self.not_json += result.failed and result.value["error"].startswith("not valid JSON")
        self.reused, self.computed = total((self.reused, result.reused)), total((self.computed, result.computed))

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.started
        return (
            f"{self.rows} rows, {self.failed} of them failed | {self.tokens} tokens in {seconds:.1f} s: "
            f"{self.rows / seconds:.1f} rows/s, {self.tokens / seconds:.1f} tok/s | "
            f"positions: {format_count(self.reused)} reused, {format_count(self.computed)} computed"
        )


def _count_rows(file: Path, done: int) -> int | None:
    """How many rows there are to complete; None if reading them to count would lose them."""
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip()) - done
