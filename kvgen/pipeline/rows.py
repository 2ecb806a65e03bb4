"""Input rows of JSONL. Does not import torch. An invalid row carries its error; the others continue."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from kvgen.errors import UsageError, as_kvgen_error
from kvgen.generation.settings import Constraint, Request, Sampling
from kvgen.tokenizer.chat import check_messages

SAMPLING_FIELDS = frozenset(field.name for field in fields(Sampling))
_OTHERS = ("max_tokens", "stop")
_CONSTRAINTS: Mapping[str, tuple[Literal["json-schema", "regex", "grammar"], type]] = {
    "json_schema": ("json-schema", dict),
    "regex": ("regex", str),
    "grammar": ("grammar", str),
}
_FIELDS = {"id", "prompt", "messages", "metadata", *SAMPLING_FIELDS, *_OTHERS, *_CONSTRAINTS}
_MAX_DEPTH = 100  # levels of a row's JSON
_MAX_ID_DIGITS = 20  # of a token id


@dataclass(frozen=True)
class InputRow:
    """One row.

    index: its number among the rows, from 0. id: its `id` field, or the index. digest: of the line, to detect changes.
    prompt: text, or messages. sampling, others: settings of the row for `Sampling` and `Request`. metadata: copied to
    the result. error: why the row is invalid; None if it is valid. line: its source.
    """

    index: int
    id: str | int
    digest: str
    prompt: Any = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    metadata: Any = None
    error: str | None = None
    line: bytes = field(default=b"", repr=False)

    def request(self, defaults: Request, most_tokens: int | None = None) -> Request:
        """Return the request, without a prompt. defaults: for settings that the row leaves out.

        most_tokens: upper bound for the row's max_tokens. Without a seed of its own, the row gets the default seed plus
        its index. Raises UsageError for values of the wrong type or out of range.
        """
        assert self.error is None
        sampling = defaults.sampling
        seed = None if sampling.seed is None else (sampling.seed + self.index) % 2**63
        request = replace(defaults, sampling=replace(sampling, **{"seed": seed, **self.sampling}), **self.others)
        return request if most_tokens is None else replace(request, max_tokens=min(request.most_tokens, most_tokens))

    def labels(self) -> dict[str, Any]:
        """Return the fields of a result that identify its row."""
        labels = {"index": self.index, "id": self.id, "digest": self.digest}
        return labels if self.metadata is None else {**labels, "metadata": self.metadata}


def read_rows(lines: Iterable[bytes]) -> Iterator[InputRow]:
    """Parse lines into rows, skipping blank ones."""
    yield from (read_row(index, line) for index, line in enumerate(line for line in lines if line.strip()))


def read_row(index: int, line: bytes) -> InputRow:
    """Parse a line of JSON: a string, or an object with `prompt` or `messages`."""
    digest = hashlib.sha256(line.strip()).hexdigest()[:16]
    id_: str | int = index
    try:
        row = parse_json(line)
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise UsageError('a row is a string, or an object with "prompt" or "messages"')
        given_id = row.get("id", index)
        if isinstance(given_id, bool) or not isinstance(given_id, str | int):
            raise UsageError("`id` must be a string or a whole number")
        id_ = given_id
        if unknown := row.keys() - _FIELDS:
            raise UsageError(f"unknown field {min(unknown)!r}; put extra data into `metadata`")
        if null := next((name for name in row if row[name] is None and name != "metadata"), None):
            raise UsageError(f"`{null}` must not be null")
        prompt = _get_prompt(row)
        sampling = {name: row[name] for name in SAMPLING_FIELDS & row.keys()}
        if "logit_bias" in sampling:
            sampling["logit_bias"] = parse_logit_bias(sampling["logit_bias"])
        others = {name: row[name] for name in _OTHERS if name in row}
        if constraint := parse_constraint(row):
            others["constraint"] = constraint
        found = InputRow(index, id_, digest, prompt, sampling, others, row.get("metadata"), line=line)
        found.request(Request(()))  # checks types and ranges
        return found
    except Exception as error:  # noqa: BLE001 (an invalid row must not stop the others)
        return InputRow(index, id_, digest, error=str(as_kvgen_error(error)), line=line)


def parse_json(line: bytes) -> Any:
    """Decode JSON of bounded depth and finite numbers. Raises UsageError if it is not."""
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
        if max(text.count("["), text.count("{")) > _MAX_DEPTH:
            _check_depth(text)
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float)
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise UsageError(f"not valid JSON ({error})") from None


def _check_depth(text: str) -> None:
    """Bound the parser's recursion. Brackets in strings count too: it suffices to be strict."""
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > _MAX_DEPTH:
            raise UsageError(f"more than {_MAX_DEPTH} levels of JSON")


def _refuse_constant(name: str) -> None:
    raise UsageError(f"not valid JSON ({name} is not a number)")


def _parse_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):  # could not be written to the result as JSON
        raise UsageError(f"the number {digits:.40} is too large")
    return number


def _get_prompt(row: Mapping[str, Any]) -> Any:
    if ("prompt" in row) == ("messages" in row):
        raise UsageError("give one of `prompt` and `messages`")
    if "messages" in row:
        return check_messages(row["messages"])
    if not isinstance(row["prompt"], str):
        raise UsageError("`prompt` must be a string")
    return row["prompt"]


def parse_logit_bias(value: Any) -> dict[int, Any]:
    """Return token ids and numbers from JSON, whose keys are strings. Raises UsageError."""
    if not isinstance(value, dict) or not all(key.isdecimal() and len(key) <= _MAX_ID_DIGITS for key in value):
        raise UsageError("`logit_bias` must map token ids to numbers")
    return {int(key): bias for key, bias in value.items()}


def parse_constraint(row: Mapping[str, Any]) -> Constraint | None:
    """Return the constraint of `json_schema`, `regex` or `grammar`, or None. Raises UsageError for two of them."""
    given = [name for name in _CONSTRAINTS if name in row]
    if len(given) > 1:
        raise UsageError("give one of `json_schema`, `regex` and `grammar`")
    for name in given:
        kind, type_ = _CONSTRAINTS[name]
        if not isinstance(row[name], type_):
            raise UsageError(f"`{name}` must be {'an object' if type_ is dict else 'a string'}")
        return Constraint(kind, json.dumps(row[name]) if type_ is dict else row[name])
    return None
