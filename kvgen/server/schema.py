"""From the JSON of OpenAI's API to requests. Unknown fields are refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvgen.errors import ContextError, UsageError
from kvgen.generation.completion import Limits
from kvgen.generation.settings import DEFAULT_MAX_TOKENS, Constraint, Request, Sampling, are_ids, is_whole
from kvgen.loading.load import Loaded
from kvgen.pipeline.rows import SAMPLING_FIELDS, parse_constraint, parse_logit_bias
from kvgen.server.tools import check_tools, template_messages
from kvgen.tokenizer.tokenizer import texts

_OWN = {"max_context", "keep_first", "regex", "grammar", "json_schema", "cache"}
_COMMON = {"model", "max_tokens", "n", "stop", "stream", "stream_options", *SAMPLING_FIELDS, *_OWN}
_IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
_COMPLETION = _COMMON | _IGNORED | {"prompt", "logprobs", "return_tokens_as_token_ids", "echo", "best_of", "suffix"}
_CHAT = (
    _COMMON
    | _IGNORED
    | {
        *("messages", "max_completion_tokens", "response_format", "tools", "tool_choice", "parallel_tool_calls"),
        *("logprobs", "top_logprobs"),
    }
)
_MOST_CHOICES, _MOST_LOGPROBS = 128, 20
_MOST_STOPS = 64  # each is searched for at each token; OpenAI's API has 4


class FieldError(UsageError):
    """A field of a request that cannot be served. code: OpenAI's, or None."""

    def __init__(self, field: str, message: str, code: str | None = None) -> None:
        super().__init__(f"`{field}`: {message}", field)
        self.code = code


@dataclass(frozen=True)
class Job:
    """What a client asks for: one request for each choice.

    chat: whether it is a conversation. tools: whether tool calls are parsed from the answer. token_ids: whether tokens
    of log-probabilities are named by their ids, as in `token_id:17`.
    """

    requests: tuple[Request, ...]
    chat: bool
    stream: bool = False
    include_usage: bool = False
    tools: bool = False
    token_ids: bool = False


def parse_completion(body: Mapping[str, Any], loaded: Loaded) -> Job:
    """Parse the body of /v1/completions. Raises FieldError, or UsageError as `Tokenizer` and `Request` do."""
    body = _known(body, _COMPLETION)
    for name, only in (("echo", False), ("suffix", ""), ("best_of", body.get("n", 1))):
        if body.get(name, only) != only:
            raise FieldError(name, "is not supported")
    given = _prompts(body.get("prompt"))
    _count(body, len(given))
    prompts = [_ids(prompt, loaded) for prompt in given]
    logprobs = _whole(body, "logprobs", 0, _MOST_LOGPROBS)
    settings = _settings(body, DEFAULT_MAX_TOKENS) | {"top_logprobs": logprobs}
    named = body.get("return_tokens_as_token_ids", False)
    if not isinstance(named, bool):
        raise FieldError("return_tokens_as_token_ids", "must be true or false")
    return replace(_job(loaded, prompts, settings, body, chat=False), token_ids=named)


def parse_chat(body: Mapping[str, Any], loaded: Loaded) -> Job:
    """Parse the body of /v1/chat/completions. Raises as `parse_completion`."""
    body = _known(body, _CHAT)
    if "max_completion_tokens" in body:
        body = {**body, "max_tokens": body["max_completion_tokens"]}
    settings = _settings(body, None)
    if "response_format" in body:
        if settings.get("constraint"):
            raise FieldError("response_format", "goes with no other constraint")
        settings["constraint"] = _response_format(body["response_format"])
    if body.get("logprobs", False) not in (True, False):
        raise FieldError("logprobs", "must be true or false")
    top = _whole(body, "top_logprobs", 0, _MOST_LOGPROBS)
    if top is not None and not body.get("logprobs"):
        raise FieldError("top_logprobs", "goes with `logprobs`")
    settings["top_logprobs"] = (top or 0) if body.get("logprobs") else None
    tools = check_tools(body, loaded.tokenizer)
    messages = template_messages(body.get("messages"))
    check_length([*messages, *(tools or ())], loaded)
    prompt = loaded.tokenizer.encode_chat(messages, tools=tools)
    return replace(_job(loaded, [prompt], settings, body, chat=True), tools=tools is not None)


def _known(body: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Drop nulls, which clients send for what they leave out. Raises FieldError for an unknown field."""
    given = {name: value for name, value in body.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        raise FieldError(unknown[0], "is not a field that kvgen knows", "unknown_parameter")
    return given


def check_length(value: str | Sequence[Any], loaded: Loaded) -> None:
    """Raise ContextError for a text, or messages, too long to be encoded: that takes long, and cannot fit the context.

    A token stands for as many characters as it has, and for a space around it in some vocabularies.
    """
    context = loaded.model.context_length
    length = len(value) if isinstance(value, str) else max(len(value), sum(map(len, texts(value))))
    if context is None or length <= context:
        return
    if not isinstance(value, str) and len(value) > context:
        raise ContextError(f"there are {len(value)} messages, but the model's context has room for {context} tokens")
    most = context * (loaded.tokenizer.longest + 1)
    if length > most:
        raise ContextError(
            f"the prompt has {length} characters, but the model's context has room for {context} tokens, completion "
            f"included, and so for {most} characters at most"
        )


def check_request(request: Request, loaded: Loaded) -> None:
    """Raise UsageError for too many stop texts, or a constraint that cannot be used.

    Call it off the engine: a large constraint takes seconds.
    """
    if len(request.stop) > _MOST_STOPS:
        raise UsageError(f"`stop` has {len(request.stop)} texts; the most is {_MOST_STOPS}", "stop")
    if request.constraint is not None:
        from kvgen.generation import constraint  # llguidance takes time to import

        constraint.check_constraint(request.constraint, loaded.tokenizer, loaded.model.vocab_size)


def _job(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    body: Mapping[str, Any],
    *,
    chat: bool,
) -> Job:
    count = _count(body, len(prompts))
    request = Request((), **settings)
    check_request(request, loaded)
    limits = Limits(request.most_tokens, (), loaded.model.context_length, request.max_context, request.keep_first)
    for prompt in prompts:
        limits.check_prompt(len(prompt))  # as the engine does, but once for all choices
    first = request.sampling.seed
    first = random.SystemRandom().randrange(2**31) if first is None else first
    samplings = [replace(request.sampling, seed=(first + number) % 2**63) for number in range(count)]
    requests = [replace(request, prompt=prompt, sampling=one) for prompt in prompts for one in samplings]
    stream_options = body.get("stream_options", {})
    if not isinstance(stream_options, dict) or stream_options.keys() - {"include_usage", "include_obfuscation"}:
        raise FieldError("stream_options", "knows include_usage")
    for name, value in (("stream", body.get("stream", False)), ("stream_options", stream_options.get("include_usage"))):
        if not isinstance(value, bool | None):
            raise FieldError(name, "must be true or false")
    return Job(tuple(requests), chat, bool(body.get("stream")), bool(stream_options.get("include_usage")))


def _count(body: Mapping[str, Any], prompts: int) -> int:
    """Return the number of choices for each of so many prompts."""
    count = _whole(body, "n", 1, _MOST_CHOICES) or 1
    if prompts * count > _MOST_CHOICES:
        raise FieldError("n", f"asks for {prompts * count} choices; the most is {_MOST_CHOICES}")
    return count


def _prompts(prompt: Any) -> list[str | list[int]]:
    if prompt is None:
        raise FieldError("prompt", "is missing")
    if isinstance(prompt, str) or (are_ids(prompt) and prompt):
        return [prompt]  # type: ignore[list-item]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) or are_ids(one) for one in prompt):
        return prompt
    raise FieldError("prompt", "must be a text, token ids, or a list of one of these")


def _ids(prompt: str | list[int], loaded: Loaded) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    check_length(prompt, loaded)
    return loaded.tokenizer.encode(prompt)


def _settings(body: Mapping[str, Any], most_tokens: int | None) -> dict[str, Any]:
    """Arguments for `Request` but the prompt. most_tokens: by default."""
    sampling = {name: body[name] for name in SAMPLING_FIELDS & body.keys()}
    if "logit_bias" in sampling:
        sampling["logit_bias"] = parse_logit_bias(sampling["logit_bias"])
    if not isinstance(body.get("cache", True), bool):
        raise FieldError("cache", "must be true or false")
    settings = {name: body[name] for name in ("stop", "max_context", "keep_first") if name in body}
    settings |= {"max_tokens": body.get("max_tokens", most_tokens), "use_cache": body.get("cache", True)}
    return {**settings, "sampling": Sampling(**sampling), "constraint": parse_constraint(body)}


def _response_format(value: Any) -> Constraint | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json-schema", '{"type": "object"}')
    schema = value.get("json_schema", {}) if kind == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise FieldError("response_format", 'must be of type "text", "json_object", or "json_schema" with a schema')
    return Constraint("json-schema", json.dumps(schema["schema"]))


def _whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is not None and not (is_whole(value) and least <= value <= most):
        raise FieldError(name, f"must be a whole number from {least} to {most}")
    return value
