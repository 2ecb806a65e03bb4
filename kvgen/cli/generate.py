"""`kvgen generate`: complete prompts and stream the text."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from kvgen.cli import options
from kvgen.cli.errors import print_error
from kvgen.cli.generation_options import CompletionOptions, PromptOptions
from kvgen.cli.groups import takes_groups
from kvgen.cli.model import ModelOptions
from kvgen.cli.prompts import GivenPrompt, read_prompts, with_piped_text
from kvgen.cli.render import TextWriter, notes, print_note, with_prefill_bar, write_json
from kvgen.cli.stats import Meter, format_cache, format_stats
from kvgen.errors import KvgenError, UsageError, of_item
from kvgen.generation.settings import Request

if TYPE_CHECKING:
    from kvgen import Batch, Chunk, Loaded, Step, Tokenizer
    from kvgen.generation.drafts import Drafter


@takes_groups()
def generate(
    *,
    text: options.PromptArgument = None,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    lines: options.Lines = False,
    reading: PromptOptions,
    source: ModelOptions,
    completion: CompletionOptions,
    speculate: options.Speculate = "off",
    draft: options.DraftModel = None,
    prompt_cache: options.PromptCache = None,
    no_cache: options.NoCache = False,
    verify_cache: options.VerifyCache = None,
    json: options.Json = False,
    logprobs: options.Logprobs = None,
    stats: options.Stats = False,
    raw: options.Raw = False,
    quiet: options.Quiet = False,
) -> None:
    """Complete prompts, streaming the text to stdout.

    Text that is piped in is the prompt, or goes before the one that is given, with a line break between. That is said
    on stderr, for a loop like `while read` may have meant its stdin for itself. A pipe that stays silent for ten
    seconds is left alone, and so is a file that a loop has begun to read. `-f -` reads stdin in any case, and
    `< /dev/null` leaves it out.
    """
    reading.check()
    if text is not None and prompt is not None:
        raise UsageError("give the prompt once: as PROMPT or with --prompt")
    if draft is not None and speculate != "off":
        raise UsageError("--draft-model and --speculate do not go together")
    if (draft is not None or speculate != "off") and (no_cache or verify_cache is not None):
        raise UsageError("--speculate and --draft-model need the cache, and go without --verify-cache")
    if prompt_cache is not None and (no_cache or verify_cache is not None):
        raise UsageError("--prompt-cache needs the cache, and goes without --verify-cache")
    if logprobs is not None and not json:
        raise UsageError("--logprobs goes with --json")
    wanted = completion.request(logprobs)
    prompt = text if prompt is None else prompt
    if not lines:
        prompt = with_piped_text(prompt, prompt_file, notes(quiet=quiet))
    prompts = read_prompts(prompt, prompt_file, lines=lines)
    first = list(islice(prompts, 1))  # an empty prompt is refused before a model is loaded
    if not first:
        return  # --lines of an empty file: nothing to do
    started = time.perf_counter()
    loaded = source.load(quiet=quiet)
    load_seconds = time.perf_counter() - started
    loaded = reading.prepared(loaded)
    if not quiet and not reading.chat and loaded.tokenizer.chat_template is not None and _is_watched():
        print_note("this model has a chat template: --chat puts the prompt into it, and so does kvgen chat")
    if not no_cache:
        loaded = _verified(loaded, verify_cache)

    from kvgen import Batch
    from kvgen.generation.batch import in_order

    cache: Any = None
    if prompt_cache is not None:
        from kvgen.generation.prompt_cache import open_prompt_cache, save_prompt_cache

        cache = open_prompt_cache(prompt_cache, loaded)
    drafter = _drafter(loaded, speculate, draft, source, quiet=quiet)
    batch = Batch(
        loaded,
        max_cache_bytes=loaded.cache_budget if lines else None,
        use_cache=not no_cache,
        cache=cache,
        make_drafter=drafter,
    )
    asked: dict[int, tuple[GivenPrompt, Request]] = {}

    def requests() -> Iterator[Request | KvgenError]:
        for number, given in enumerate(chain(first, prompts)):
            asked[number] = given, wanted
            try:
                if given.error is not None:
                    raise given.error
                request = replace(wanted, prompt=reading.format.encode(loaded.tokenizer, given.text))
            except Exception as error:  # noqa: BLE001 (whatever it is, it is this prompt's; alone, it ends the command)
                yield of_item(error)
            else:
                asked[number] = given, request
                yield request

    failed, number = 0, 0
    meters: dict[int, Meter] = defaultdict(Meter)
    events = with_prefill_bar(in_order(_metered(batch, requests(), meters)), loaded.model, quiet=quiet)
    for number, event in events:
        given, request = asked.pop(number)
        if lines and not quiet and sys.stderr.isatty():
            print_note(f"[{number + 1}] {given.text}")
        if stats and not quiet:
            print_note(format_cache(loaded.model, request))
        meter, chunks = meters[number], _chunks(event, events)
        try:
            if json:
                whole = "".join(chunk.text for chunk in chunks)
                write_json(_as_json(loaded, given.text, request, whole, meter))
            else:
                with TextWriter(raw=raw) as writer:
                    for chunk in chunks:
                        writer.write(chunk.text)
        except KvgenError as error:
            if not lines:
                raise
            failed += 1
            _tell(given, error, json=json)
            continue
        if prompt_cache is not None and number == 0 and not quiet:
            print_note(f"prompt cache: {meter.chunks[0].step.reused} of {meter.prompt_tokens} positions reused")
        if stats and not quiet:
            print_note(format_stats(meter, loaded, load_seconds, request.sampling))
        del meters[number]
    if prompt_cache is not None and batch.cache is not None:
        save_prompt_cache(prompt_cache, batch.cache, loaded)
    if failed:
        raise KvgenError(f"{failed} of {number + 1} lines could not be completed")


def _tell(given: GivenPrompt, error: KvgenError, *, json: bool) -> None:
    """Say why a line could not be completed, where its completion would stand in JSON, else on stderr."""
    message = f"{given.where}: {error}"
    if json:
        write_json({"prompt": given.text, "error": message})
    else:
        print_error(message)


def _is_watched() -> bool:
    """Whether someone reads the completion, and what is said of it, on a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def _metered(
    batch: Batch, requests: Iterator[Request | KvgenError], meters: Mapping[int, Meter]
) -> Iterator[tuple[int, Chunk | KvgenError]]:
    """The events of all completions, each seen by the meter of its completion when it comes, not when it is shown."""
    for number, event in batch.run(requests):
        if not isinstance(event, KvgenError):
            meters[number].add(event, batch.pass_began)
        yield number, event


def _chunks(event: Chunk | KvgenError, more: Iterator[tuple[int, Chunk | KvgenError]]) -> Iterator[Chunk]:
    """The chunks of one completion, from its first event on."""
    while True:
        if isinstance(event, KvgenError):
            raise event
        yield event
        if event.finish_reason:
            return
        _, event = next(more)


def _verified(loaded: Loaded, every: int | None) -> Loaded:
    """With its cache checked as was asked for; and once in any case if kvgen did not write the cache."""
    from kvgen.comparison.verified import VerifiedBackend

    if every is not None:
        return replace(loaded, model=VerifiedBackend(loaded.model, every))
    if loaded.model.name == "native":
        return loaded
    model = VerifiedBackend(
        loaded.model, None, lambda found: print_note(f"the cache is wrong, going on without it: {found}", "yellow")
    )
    return replace(loaded, model=model)


def _drafter(
    loaded: Loaded, speculate: str, draft: str | None, source: ModelOptions, *, quiet: bool
) -> Callable[[], Drafter] | None:
    """What makes a drafter for each completion, if one is wanted."""
    from kvgen import DraftModel, PromptLookup

    if draft is None:
        return PromptLookup if speculate == "lookup" else None
    smaller = ModelOptions(draft, source.tokenizer, source.ids, device=source.device).load(quiet=quiet)
    if not loaded.tokenizer.shares_vocabulary(smaller.tokenizer):
        raise UsageError(f"--draft-model {draft}: its vocabulary is not that of {loaded.source}")
    return lambda: DraftModel(smaller.model)


def _as_json(loaded: Loaded, prompt: str, request: Request, completion: str, meter: Meter) -> dict[str, Any]:
    steps = [chunk.step for chunk in meter.chunks]
    value: dict[str, Any] = {
        "prompt": prompt,
        "completion": completion,
        "finish_reason": meter.last.finish_reason,
        "prompt_ids": list(request.prompt),
        "completion_ids": [step.token for step in steps],
        "seed": request.sampling.seed,
        "model": loaded.source,
        **meter.as_json(),
    }
    if request.top_logprobs is not None:
        value["logprobs"] = [_logprobs_as_json(loaded.tokenizer, step) for step in steps]
    return value


def _logprobs_as_json(tokenizer: Tokenizer, step: Step) -> dict[str, Any]:
    def entry(id_: int, logprob: float | None) -> dict[str, Any]:
        # A token that a model rules out has no finite log-probability, and JSON no infinity.
        finite = logprob if logprob is None or math.isfinite(logprob) else None
        return {"id": id_, "token": tokenizer.token(id_), "logprob": finite}

    return {**entry(step.token, step.logprob), "top": [entry(*pair) for pair in step.top_logprobs]}
