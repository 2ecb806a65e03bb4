"""From chunks to the JSON of OpenAI's API: whole answers and the pieces of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import accumulate
from typing import Any

from kvgen.errors import CheckpointError, ContextError, KvgenError, NotFoundError, UnsupportedError, UsageError
from kvgen.generation.step import Step
from kvgen.generation.text import Chunk
from kvgen.server.engine import BusyError
from kvgen.server.schema import Job
from kvgen.server.tools import tool_calls
from kvgen.tokenizer import Tokenizer

_FINGERPRINT = f"kvgen-{version('kvgen')}"  # once: it is read from files
_REPLACEMENT = "\ufffd"  # what bytes become that are no character
_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps makes one for each call


def as_json(value: Any) -> bytes:
    """Return JSON in UTF-8. Lone surrogates, which UTF-8 does not have and JSON texts may, stay escapes."""
    return _JSON.encode(value).encode(errors="backslashreplace")


class TimeLimitError(KvgenError):
    """A request took too long."""


@dataclass
class Choice:
    """What has come of one request."""

    index: int
    prompt_tokens: int
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def steps(self) -> list[Step]:
        return [chunk.step for chunk in self.chunks]

    @property
    def finish_reason(self) -> str | None:
        reason = self.chunks[-1].finish_reason if self.chunks else None
        return None if reason is None else _FINISH[reason]


class Answer:
    """Formats the answer to a job."""

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer) -> None:
        self.job, self._tokenizer = job, tokenizer
        self.choices = [Choice(index, len(request.prompt)) for index, request in enumerate(job.requests)]
        self._head = {
            "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{uuid.uuid4().hex[:24]}",
            "object": "chat.completion" if job.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": _FINGERPRINT,
        }
        self._opened: set[int] = set()  # choices of a stream whose first piece was sent
        if job.stream:
            kind = "chat.completion.chunk" if job.chat else "text_completion"
            self._before = as_json({**self._head, "object": kind})[:-1] + b',"choices":'  # the same in all pieces
            self._after = b',"usage":null}' if job.include_usage else b"}"

    def whole(self) -> dict[str, Any]:
        """The answer, when all choices have ended."""
        return {**self._head, "choices": [self._whole(choice) for choice in self.choices], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Counts over all choices. A prompt of several choices counts once, as OpenAI counts."""
        prompts = {id(request.prompt): len(request.prompt) for request in self.job.requests}
        first = [choice.steps[0] for choice in self.choices if choice.chunks]
        completion = sum(len(choice.chunks) for choice in self.choices)
        prompt = sum(prompts.values())
        cached = min(prompt, sum(step.reused or 0 for step in first[: len(prompts)]))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def piece(self, index: int, chunk: Chunk) -> bytes:
        """Add a chunk to a choice; return the piece of the stream for it, in JSON, empty if there is nothing to send.

        With tools, text is sent at the end, when it is clear what of it are calls.
        """
        choice = self.choices[index]
        choice.chunks.append(chunk)
        reason, text, calls = choice.finish_reason, chunk.text, list[Any]()
        if self.job.tools:
            text, calls = tool_calls(choice.text) if reason else ("", [])
            reason = "tool_calls" if calls else reason
        delta: dict[str, Any] = {"content": text} if text or choice.index not in self._opened else {}
        if choice.index not in self._opened:
            delta["role"] = "assistant"
            self._opened.add(choice.index)
        if calls:
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        logprobs = self._logprobs([chunk], choice)
        if not (text or calls or reason or logprobs or "role" in delta):
            return b""
        body = {"delta": delta} if self.job.chat else {"text": text}
        piece = {"index": choice.index, **body, "logprobs": logprobs, "finish_reason": reason}
        return self._before + as_json([piece]) + self._after

    def last_piece(self) -> bytes:
        """The piece with the usage, which comes after all choices have ended."""
        return self._before + b'[],"usage":' + as_json(self.usage()) + b"}"

    def _whole(self, choice: Choice) -> dict[str, Any]:
        logprobs, reason = self._logprobs(choice.chunks, choice), choice.finish_reason
        if not self.job.chat:
            return {"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": reason}
        text, calls = tool_calls(choice.text) if self.job.tools else (choice.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"], reason = calls, "tool_calls"
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, chunks: Sequence[Chunk], choice: Choice) -> dict[str, Any] | None:
        """Log-probabilities of chunks, which are the last ones of a choice."""
        steps = [chunk.step for chunk in chunks if chunk.step.logprob is not None]
        if not steps:
            return None
        if self.job.chat:
            best = [[self._token(*pair) for pair in step.top_logprobs] for step in steps]
            chosen = [self._token(step.token, step.logprob) for step in steps]
            return {"content": [{**one, "top_logprobs": top} for one, top in zip(chosen, best, strict=True)]}
        lengths = [len(chunk.text) for chunk in chunks]
        start = len(choice.text) - sum(lengths)
        return {
            "tokens": [self._name(step.token) for step in steps],
            "token_logprobs": [_finite(step.logprob) for step in steps],
            "top_logprobs": [
                {self._name(id_): _finite(logprob) for id_, logprob in step.top_logprobs} for step in steps
            ],
            "text_offset": list(accumulate(lengths[:-1], initial=start)),
        }

    def _name(self, id_: int) -> str:
        """The text of a token, or its id where that is asked for, or the token is only a part of a character."""
        text = self._tokenizer.token(id_)
        return f"token_id:{id_}" if self.job.token_ids or _REPLACEMENT in text else text

    def _token(self, id_: int, logprob: float | None) -> dict[str, Any]:
        text = self._tokenizer.token(id_)
        return {
            "token": text,
            "logprob": _finite(logprob),
            "bytes": list(text.encode("utf-8", "surrogatepass")),
            "id": id_,
        }


def _finite(logprob: float | None) -> float | None:
    """Return a log-probability that JSON has; OpenAI's API writes -9999 for what is nearly impossible."""
    return None if logprob is None else max(logprob, -9999.0)


def error_body(error: KvgenError) -> tuple[int, dict[str, Any]]:
    """Return the status and the body of an error, in OpenAI's form."""
    status, kind = 500, "server_error"
    code: str | None = None
    if isinstance(error, BusyError):
        status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"
    elif isinstance(error, TimeLimitError):
        status, kind = 408, "timeout_error"
    elif isinstance(error, NotFoundError):
        status, kind, code = 404, "invalid_request_error", "model_not_found"
    elif isinstance(error, UsageError | UnsupportedError | CheckpointError):  # a chat template may fail on messages
        status, kind = 400, "invalid_request_error"
        code = "context_length_exceeded" if isinstance(error, ContextError) else getattr(error, "code", None)
    param = error.field if isinstance(error, UsageError) else None
    return status, openai_error(str(error), kind, code, param)


def openai_error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
