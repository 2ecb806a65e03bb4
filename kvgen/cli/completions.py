"""A completion as `kvgen generate --json` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvgen.cli.stats import Meter
from kvgen.generation.counts import finite
from kvgen.generation.settings import Request

if TYPE_CHECKING:
    from kvgen import Loaded, Step, Tokenizer
    from kvgen.client.remote import Remote, RemoteTokenizer


def completion_as_json(
    loaded: Loaded | Remote, prompt: str, request: Request, completion: str, meter: Meter
) -> dict[str, Any]:
    """Return a completion and its figures in JSON types."""
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


def _logprobs_as_json(tokenizer: Tokenizer | RemoteTokenizer, step: Step) -> dict[str, Any]:
    def entry(id_: int, logprob: float | None) -> dict[str, Any]:
        return {"id": id_, "token": tokenizer.token(id_), "logprob": finite(logprob)}

    return {**entry(step.token, step.logprob), "top": [entry(*pair) for pair in step.top_logprobs]}
