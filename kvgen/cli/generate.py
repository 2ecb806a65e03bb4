"""`kvgen generate`: complete prompts and stream the text."""

from __future__ import annotations

import math
import random
import sys
import time
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from kvgen.cli import options
from kvgen.cli.model import ModelOptions, takes_model_options
from kvgen.cli.prompts import read_prompts, read_template
from kvgen.cli.render import TextWriter, print_note, write_json
from kvgen.cli.stats import Meter, format_cache, format_stats
from kvgen.errors import UsageError
from kvgen.generation.settings import DEFAULT_KEEP_FIRST, DEFAULT_MAX_TOKENS, Sampling

if TYPE_CHECKING:
    from kvgen import DraftModel, Loaded, Message, Step, Tokenizer


@takes_model_options()
def generate(
    *,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    lines: options.Lines = False,
    chat: options.Chat = False,
    system: options.System = None,
    chat_template: options.ChatTemplateFile = None,
    parse_special: options.ParseSpecial = False,
    source: ModelOptions,
    max_tokens: options.MaxTokens = DEFAULT_MAX_TOKENS,
    stop: options.Stop = None,
    max_context: options.MaxContext = None,
    keep_first: options.KeepFirst = DEFAULT_KEEP_FIRST,
    temperature: options.Temperature = Sampling.temperature,
    top_k: options.TopK = Sampling.top_k,
    top_p: options.TopP = Sampling.top_p,
    min_p: options.MinP = Sampling.min_p,
    typical_p: options.TypicalP = Sampling.typical_p,
    repetition_penalty: options.RepetitionPenalty = Sampling.repetition_penalty,
    presence_penalty: options.PresencePenalty = Sampling.presence_penalty,
    frequency_penalty: options.FrequencyPenalty = Sampling.frequency_penalty,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
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

    With neither --prompt nor --prompt-file, the prompt is read from stdin, unless that is a terminal.
    """
    if system is not None and not chat:
        raise UsageError("--system goes with --chat")
    if chat_template is not None and not chat:
        raise UsageError("--chat-template goes with --chat")
    if draft is not None and speculate != "off":
        raise UsageError("--draft and --speculate do not go together")
    if (draft is not None or speculate != "off") and (no_cache or verify_cache is not None):
        raise UsageError("--speculate and --draft need the cache, and go without --verify-cache")
    if prompt_cache is not None and (no_cache or verify_cache is not None):
        raise UsageError("--prompt-cache needs the cache, and goes without --verify-cache")
    if logprobs is not None and not json:
        raise UsageError("--logprobs goes with --json")
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=options.parse_logit_bias(logit_bias),
        seed=random.SystemRandom().randrange(2**31) if seed is None else seed,
    )
    template = None if chat_template is None else read_template(chat_template)
    prompts = read_prompts(prompt, prompt_file, lines=lines)
    first = list(islice(prompts, 1))  # an empty prompt is refused before a model is loaded
    if not first:
        return  # --lines of an empty file: nothing to do
    started = time.perf_counter()
    loaded = source.load(quiet=quiet)
    load_seconds = time.perf_counter() - started
    if template is not None:
        loaded = replace(loaded, tokenizer=loaded.tokenizer.with_chat_template(template))
    if not no_cache:
        loaded = _verified(loaded, verify_cache)

    from kvgen import PromptLookup, stream

    draft_model = None if draft is None else _draft_model(loaded, draft, source, quiet=quiet)
    cache: Any = None
    if prompt_cache is not None:
        from kvgen.prompt_cache import open_prompt_cache, save_prompt_cache

        cache = open_prompt_cache(prompt_cache, loaded)
    for number, text in enumerate(chain(first, prompts), start=1):
        if lines and not quiet and sys.stderr.isatty():
            print_note(f"[{number}] {text}")
        prompt_ids = _encode(loaded.tokenizer, text, chat=chat, system=system, parse_special=parse_special)
        chunks = stream(
            loaded,
            prompt_ids,
            sampling,
            max_tokens=max_tokens,
            stop=stop or (),
            use_cache=not no_cache,
            cache=cache,
            top_logprobs=logprobs,
            max_context=max_context,
            keep_first=keep_first,
            drafter=PromptLookup() if speculate == "lookup" else draft_model,
        )
        if stats and not quiet:
            most = len(prompt_ids) + max_tokens
            print_note(format_cache(loaded.model, min(most, max_context or loaded.model.context_length or most)))
        meter = Meter()
        if json:
            completion = "".join(chunk.text for chunk in meter.watch(chunks))
            write_json(_as_json(loaded, text, prompt_ids, completion, meter, sampling, logprobs is not None))
        else:
            with TextWriter(raw=raw) as writer:
                for chunk in meter.watch(chunks):
                    writer.write(chunk.text)
        if prompt_cache is not None and number == 1 and not quiet:
            print_note(f"prompt cache: {meter.chunks[0].step.reused} of {meter.prompt_tokens} positions reused")
        cache = meter.last.step.cache  # what the next prompt shares with this one is not computed again
        if stats and not quiet:
            print_note(format_stats(meter, loaded, load_seconds, sampling))
    if prompt_cache is not None:
        save_prompt_cache(prompt_cache, cache, loaded)


def _verified(loaded: Loaded, every: int | None) -> Loaded:
    """With its cache checked as was asked for; and once in any case if kvgen did not write the cache."""
    from kvgen.generation.verify import VerifiedBackend

    if every is not None:
        return replace(loaded, model=VerifiedBackend(loaded.model, every))
    if loaded.model.name == "native":
        return loaded
    model = VerifiedBackend(
        loaded.model, None, lambda found: print_note(f"the cache is wrong, going on without it: {found}", "yellow")
    )
    return replace(loaded, model=model)


def _draft_model(loaded: Loaded, draft: str, source: ModelOptions, *, quiet: bool) -> DraftModel:
    from kvgen import DraftModel

    smaller = ModelOptions(draft, source.tokenizer, source.ids, device=source.device).load(quiet=quiet)
    if not loaded.tokenizer.shares_vocabulary(smaller.tokenizer):
        raise UsageError(f"--draft {draft}: its vocabulary is not that of {loaded.source}")
    return DraftModel(smaller.model)


def _encode(tokenizer: Tokenizer, prompt: str, *, chat: bool, system: str | None, parse_special: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(prompt, parse_special=parse_special)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}], parse_special=parse_special)


def _as_json(
    loaded: Loaded,
    prompt: str,
    ids: list[int],
    completion: str,
    meter: Meter,
    sampling: Sampling,
    logprobs: bool,
) -> dict[str, Any]:
    steps = [chunk.step for chunk in meter.chunks]
    value: dict[str, Any] = {
        "prompt": prompt,
        "completion": completion,
        "finish_reason": meter.last.finish_reason,
        "prompt_ids": ids,
        "completion_ids": [step.token for step in steps],
        "seed": sampling.seed,
        "model": loaded.source,
        **meter.as_json(),
    }
    if logprobs:
        value["logprobs"] = [_logprobs_as_json(loaded.tokenizer, step) for step in steps]
    return value


def _logprobs_as_json(tokenizer: Tokenizer, step: Step) -> dict[str, Any]:
    def entry(id_: int, logprob: float | None) -> dict[str, Any]:
        # A token that a model rules out has no finite log-probability, and JSON no infinity.
        finite = logprob if logprob is None or math.isfinite(logprob) else None
        return {"id": id_, "token": tokenizer.token(id_), "logprob": finite}

    return {**entry(step.token, step.logprob), "top": [entry(*pair) for pair in step.top_logprobs]}
