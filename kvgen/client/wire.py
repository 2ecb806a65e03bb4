"""Requests, events and errors as JSON, as kvgen's client and its server exchange them.

Both run the same version of kvgen, which the client checks, so there is one format. Numbers keep all their digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from kvgen import errors
from kvgen.errors import KvgenError, UsageError
from kvgen.generation.settings import Constraint, Request, Sampling
from kvgen.generation.step import Step
from kvgen.generation.text import Chunk

PREFIX = "/kvgen/v1"  # of the paths
_ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, KvgenError)}


def authorization(key: str) -> bytes:
    """Return the value of the header with an API key. Raises UsageError for a key that a header cannot carry."""
    if not key.isprintable() or key != key.strip():
        raise UsageError("KVGEN_API_KEY must be UTF-8 text without control characters, and without spaces around it")
    return b"Bearer " + key.encode()


def request_as_json(request: Request) -> dict[str, Any]:
    return {
        **{field.name: getattr(request, field.name) for field in fields(Request)},
        "prompt": list(request.prompt),
        "sampling": asdict(request.sampling),
        "constraint": None if request.constraint is None else asdict(request.constraint),
    }


def read_request(value: Any) -> Request:
    """Return a request from decoded JSON. Raises UsageError if it is not one."""
    settings = _fields_of(Request, value, "request")
    sampling = _fields_of(Sampling, settings.get("sampling", {}), "sampling")
    bias = sampling.get("logit_bias", {})
    if not isinstance(bias, dict) or not all(id_.isdecimal() and len(id_) < 20 for id_ in bias):
        raise UsageError("`logit_bias` must map token ids to numbers")
    sampling["logit_bias"] = {int(id_): value for id_, value in bias.items()}
    if (constraint := settings.get("constraint")) is not None:
        parts = _fields_of(Constraint, constraint, "constraint")
        if parts.get("kind") not in ("json-schema", "regex", "grammar") or not isinstance(parts.get("text"), str):
            raise UsageError("`constraint` must have a kind and a text")
        settings["constraint"] = Constraint(**parts)
    return Request(**{"prompt": (), **settings, "sampling": Sampling(**sampling)})


def _fields_of(kind: Any, value: Any, name: str) -> dict[str, Any]:
    """Return the fields of a dataclass from decoded JSON. Raises UsageError for others."""
    if not isinstance(value, Mapping):
        raise UsageError(f"`{name}` must be an object")
    if unknown := sorted(value.keys() - {field.name for field in fields(kind)}):
        raise UsageError(f"`{name}` has no field `{unknown[0]}`")
    return dict(value)


def event_as_json(event: Chunk | KvgenError) -> dict[str, Any]:
    """Return a line of the answer to a request."""
    if isinstance(event, KvgenError):
        return {"error": error_as_json(event)}
    return {"text": event.text, "finish_reason": event.finish_reason, "step": vars(event.step)}


def read_event(value: Mapping[str, Any]) -> Chunk:
    """Return a chunk from decoded JSON. Raises the KvgenError that is there instead."""
    if "error" in value:
        raise read_error(value["error"])
    step = value["step"]
    top = tuple((id_, logprob) for id_, logprob in step["top_logprobs"])
    return Chunk(value["text"], Step(**{**step, "top_logprobs": top}), value["finish_reason"])


def error_as_json(error: KvgenError) -> dict[str, Any]:
    return {"message": str(error), "type": type(error).__name__}


def read_error(value: Mapping[str, Any]) -> KvgenError:
    """Return an error of the same kind as on the server, so that it has the same exit code."""
    return _ERRORS.get(value["type"], KvgenError)(value["message"])
