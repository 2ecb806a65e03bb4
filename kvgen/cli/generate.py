"""`kvgen generate`: complete prompts and stream the text."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from kvgen.cli import options
from kvgen.cli.completions import completion_as_json
from kvgen.cli.errors import print_error
from kvgen.cli.groups import CompletionOptions, ModelOptions, PromptOptions, takes_groups
from kvgen.cli.prompts import GivenPrompt, read_prompts, with_piped_text
from kvgen.cli.remote import changed, connected
from kvgen.cli.render import TextWriter, notes, print_note, with_prefill_bar, write_json
from kvgen.cli.stats import Meter, format_cache, format_stats
from kvgen.errors import KvgenError, UsageError, as_kvgen_error
from kvgen.generation.settings import Request

if TYPE_CHECKING:
    from kvgen import Batch, Chunk, Loaded
    from kvgen.client.batch import RemoteBatch
    from kvgen.client.remote import Remote
    from kvgen.generation.drafts import Drafter

    _Completion = tuple[GivenPrompt, Request, Meter, Iterator[Chunk]]


@dataclass(frozen=True)
class CacheOptions:
    """Options for the KV cache and speculative decoding."""

    speculate: options.Speculate = "off"
    draft_model: options.DraftModel = None
    prompt_cache: options.PromptCache = None
    no_cache: options.NoCache = False
    verify_cache: options.VerifyCache = None

    def check(self) -> None:
        """Raise UsageError for options that exclude each other."""
        if self.draft_model is not None and self.speculate != "off":
            raise UsageError("give --draft-model or --speculate, not both")
        if self.no_cache or self.verify_cache is not None:
            if self.draft_model is not None or self.speculate != "off":
                raise UsageError("--speculate and --draft-model do not go with --no-cache or --verify-cache")
            if self.prompt_cache is not None:
                raise UsageError("--prompt-cache does not go with --no-cache or --verify-cache")

    def verified(self, loaded: Loaded) -> Loaded:
        """Check the cache as --verify-cache says; a cache that is not kvgen's own is checked once in any case."""
        if self.no_cache or (self.verify_cache is None and loaded.model.name == "native"):
            return loaded
        from kvgen.comparison.verified import VerifiedBackend

        def warn(found: str) -> None:
            print_note(f"the cache is wrong, continuing without it: {found}", "yellow")

        on_wrong = warn if self.verify_cache is None else None
        return replace(loaded, model=VerifiedBackend(loaded.model, self.verify_cache, on_wrong))

    def drafter(self, loaded: Loaded, source: ModelOptions, *, quiet: bool) -> Callable[[], Drafter] | None:
        """Return a function that makes a drafter for each completion; None without speculation."""
        from kvgen import DraftModel, PromptLookup

        if self.draft_model is None:
            return PromptLookup if self.speculate == "lookup" else None
        smaller = ModelOptions(self.draft_model, source.tokenizer, source.ids, device=source.device).load(quiet=quiet)
        if not loaded.tokenizer.shares_vocabulary(smaller.tokenizer):
            raise UsageError(f"--draft-model {self.draft_model}: its vocabulary is not that of {loaded.source}")
        return lambda: DraftModel(smaller.model)


@dataclass(frozen=True)
class OutputOptions:
    """Options for what is printed, and where."""

    json: options.Json = False
    logprobs: options.Logprobs = None
    stats: options.Stats = False
    raw: options.Raw = False
    quiet: options.Quiet = False


@takes_groups()
def generate(
    *,
    text: options.PromptArgument = None,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    lines: options.Lines = False,
    reading: PromptOptions,
    source: ModelOptions,
    server: options.Server = None,
    completion: CompletionOptions,
    caching: CacheOptions,
    output: OutputOptions,
) -> None:
    """Complete prompts, streaming the text to stdout.

    Piped text is the prompt, or goes before the prompt that you give, with a line break between; a note on stderr says
    so. A pipe that stays silent for ten seconds is ignored, and so is a file that another program, such as a shell
    loop, has begun to read. `-f -` always reads stdin; `< /dev/null` leaves it out.
    """
    quiet = output.quiet
    reading.check()
    caching.check()
    if text is not None and prompt is not None:
        raise UsageError("give the prompt once: as PROMPT or with --prompt")
    if output.logprobs is not None and not output.json:
        raise UsageError("--logprobs goes with --json")
    request = completion.request(output.logprobs)
    prompt = text if prompt is None else prompt
    if not lines:
        prompt = with_piped_text(prompt, prompt_file, notes(quiet=quiet))
    prompts = read_prompts(prompt, prompt_file, lines=lines)
    first = next(prompts, None)  # refuse an empty prompt before loading a model
    if first is None:
        return  # --lines with an empty file
    if server:
        request = replace(request, use_cache=not caching.no_cache)
        engine = _connect(server, source, reading, caching)
    else:
        engine = _load(source, reading, caching, lines=lines, quiet=quiet)
    loaded = engine.loaded
    on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if on_terminal and not quiet and not reading.chat and loaded.tokenizer.chat_template is not None:
        print_note("this model has a chat template: --chat puts the prompt into it, and so does kvgen chat")
    completions = _complete(engine.batch, loaded, chain([first], prompts), reading, request, quiet=quiet)
    show_reuse = caching.prompt_cache is not None and not quiet
    failed, count = _print_all(completions, loaded, engine.load_seconds, output, lines=lines, show_reuse=show_reuse)
    engine.save()
    if failed:
        raise KvgenError(f"{failed} of {count} lines could not be completed")


@dataclass(frozen=True)
class _Engine:
    """A model, what completes requests, and a function that saves the prompt cache, if there is one."""

    loaded: Loaded | Remote
    batch: Batch | RemoteBatch
    load_seconds: float
    save: Callable[[], None]


def _load(source: ModelOptions, reading: PromptOptions, caching: CacheOptions, *, lines: bool, quiet: bool) -> _Engine:
    started = time.perf_counter()
    loaded = source.load(quiet=quiet)
    load_seconds = time.perf_counter() - started
    loaded = caching.verified(reading.prepared(loaded))

    from kvgen import Batch
    from kvgen.generation.prompt_cache import open_prompt_cache, save_prompt_cache

    batch = Batch(
        loaded,
        max_cache_bytes=loaded.cache_budget if lines else None,
        use_cache=not caching.no_cache,
        kept=[] if caching.prompt_cache is None else [open_prompt_cache(caching.prompt_cache, loaded)],
        make_drafter=caching.drafter(loaded, source, quiet=quiet),
    )

    def save() -> None:
        if caching.prompt_cache is not None and batch.cache is not None:
            save_prompt_cache(caching.prompt_cache, batch.cache, loaded)

    return _Engine(loaded, batch, load_seconds, save)


def _connect(server: str, source: ModelOptions, reading: PromptOptions, caching: CacheOptions) -> _Engine:
    started = time.perf_counter()
    refused = [name for name in changed(caching) if name != "no_cache"]
    remote = reading.prepared(connected(server, source, refused))
    return _Engine(remote, remote.batch(), time.perf_counter() - started, lambda: None)


def _complete(
    batch: Batch | RemoteBatch,
    loaded: Loaded | Remote,
    prompts: Iterable[GivenPrompt],
    reading: PromptOptions,
    request: Request,
    *,
    quiet: bool,
) -> Iterator[_Completion]:
    """Complete prompts in order; yield each with its request, meter and chunks.

    If a prompt fails, iterating over its chunks raises KvgenError. Read the chunks to the end before the next prompt.
    """
    from kvgen.generation.events import in_order

    started: dict[int, tuple[GivenPrompt, Request]] = {}
    meters: dict[int, Meter] = defaultdict(Meter)

    def requests() -> Iterator[Request | KvgenError]:
        for number, given in enumerate(prompts):
            started[number] = given, request
            try:
                if given.error is not None:
                    raise given.error
                encoded = replace(request, prompt=reading.format.encode(loaded.tokenizer, given.text))
            except Exception as error:  # noqa: BLE001 (any error fails this prompt alone)
                yield as_kvgen_error(error)
            else:
                started[number] = given, encoded
                yield encoded

    def metered() -> Iterator[tuple[int, Chunk | KvgenError]]:  # times chunks when they come, not when they are shown
        for number, event in batch.run(requests()):
            if not isinstance(event, KvgenError):
                meters[number].add(event, batch.pass_began)
            yield number, event

    events = with_prefill_bar(in_order(metered()), loaded.model, quiet=quiet)
    for number, event in events:
        yield *started.pop(number), meters[number], _chunks(event, events)
        del meters[number]


def _chunks(event: Chunk | KvgenError, events: Iterator[tuple[int, Chunk | KvgenError]]) -> Iterator[Chunk]:
    """Yield the chunks of one completion, starting with `event`."""
    while True:
        if isinstance(event, KvgenError):
            raise event
        yield event
        if event.finish_reason:
            return
        _, event = next(events)


def _print_all(
    completions: Iterable[_Completion],
    loaded: Loaded | Remote,
    load_seconds: float,
    output: OutputOptions,
    *,
    lines: bool,
    show_reuse: bool,
) -> tuple[int, int]:
    """Print completions as they come. Return how many failed, of how many; without --lines, raise the error instead."""
    count = failed = 0
    show_stats = output.stats and not output.quiet
    tell_dropped = sys.stderr.isatty() and not output.quiet
    for given, request, meter, chunks in completions:
        count += 1
        if lines and not output.quiet and sys.stderr.isatty():
            print_note(f"[{count}] {given.text}")
        if show_stats:
            print_note(format_cache(loaded.model, request))
        try:
            if output.json:
                text = "".join(chunk.text for chunk in chunks)
                write_json(completion_as_json(loaded, given.text, request, text, meter))
            else:
                with TextWriter(raw=output.raw) as writer:
                    for chunk in chunks:
                        writer.write(chunk.text)
        except KvgenError as error:
            if not lines:
                raise
            failed += 1
            message = f"{given.where}: {error}"
            if output.json:
                write_json({"prompt": given.text, "error": message})
            else:
                print_error(message)
            continue
        if show_reuse and count == 1:
            print_note(f"prompt cache: {meter.chunks[0].step.reused} of {meter.prompt_tokens} positions reused")
        if tell_dropped and meter.last.step.dropped:
            print_note("--max-context: the middle of the text was dropped, which the model no longer sees")
            tell_dropped = False
        if show_stats:
            print_note(format_stats(meter, loaded, load_seconds, request.sampling))
    return failed, count
