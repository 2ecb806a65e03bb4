"""Rows of JSONL: what each asks for. Free of torch; a row that asks for what cannot be says so, and stops nobody."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvgen.errors import UsageError, of_item
from kvgen.generation.settings import Constraint, Request
from kvgen.tokenizer.chat import check_messages

_NUMBER = (int, float)
# What a row may set for itself, besides its prompt, and the JSON types that it may be.
SAMPLING_FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p"), _NUMBER),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _NUMBER),
    **dict.fromkeys(("top_k", "seed"), (int,)),
    "logit_bias": (dict,),
}
_OTHERS: Mapping[str, tuple[type, ...]] = {"max_tokens": (int,), "stop": (str, list)}
_CONSTRAINTS: Mapping[str, tuple[type, ...]] = {"json_schema": (dict,), "regex": (str,), "grammar": (str,)}
_FIELDS = {"id", "prompt", "messages", "metadata", *SAMPLING_FIELDS, *_OTHERS, *_CONSTRAINTS}
_DEEPEST = 100  # levels of a row's JSON
_ID_DIGITS = 20  # of a token id


@dataclass(frozen=True)
class InputRow:
    """What one line asks for.

    index: its number among the rows, from 0. id: what the row calls itself, or its index. digest: of the line, to tell
    it from another.
    prompt: text, or a conversation. sampling, others: what the row sets for itself. metadata: passed through.
    error: what is wrong with it; the rest then means nothing. line: what it was read from.
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
        """The request, without its prompt's ids. defaults: what it sets nothing else for.

        most_tokens: a row that asks for more gets so many.
        A row without a seed has the default's plus its index. Raises UsageError for a value out of its range.
        """
        assert self.error is None
        sampling = defaults.sampling
        seed = None if sampling.seed is None else (sampling.seed + self.index) % 2**63
        request = replace(defaults, sampling=replace(sampling, **{"seed": seed, **self.sampling}), **self.others)
        return request if most_tokens is None else replace(request, max_tokens=min(request.most_tokens, most_tokens))

    def labels(self) -> dict[str, Any]:
        """What a result says of the row that it is for."""
        labels = {"index": self.index, "id": self.id, "digest": self.digest}
        return labels if self.metadata is None else {**labels, "metadata": self.metadata}


def read_rows(lines: Iterable[bytes]) -> Iterator[InputRow]:
    """The rows of lines; empty ones are none."""
    index = 0
    for line in lines:
        if line.strip():
            yield read_row(index, line)
            index += 1


def read_row(index: int, line: bytes) -> InputRow:
    """The row of a line of JSON: a string, or an object with `prompt` or `messages`."""
    digest = hashlib.sha256(line.strip()).hexdigest()[:16]
    id_: str | int = index
    try:
        value = _parsed(line)
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            raise UsageError('a row is a string, or an object with "prompt" or "messages"')
        id_ = _id(value, index)
        unknown = value.keys() - _FIELDS
        if unknown:
            raise UsageError(f"unknown field {min(unknown)!r}; what is only to be passed through goes into `metadata`")
        prompt, sampling, others = _prompt(value), _chosen(value, SAMPLING_FIELDS), _chosen(value, _OTHERS)
        if "logit_bias" in sampling:
            sampling["logit_bias"] = _logit_bias(sampling["logit_bias"])
        if "stop" in others:
            others["stop"] = _stops(others["stop"])
        constraint = _constraint(_chosen(value, _CONSTRAINTS))
        if constraint is not None:
            others["constraint"] = constraint
        row = InputRow(index, id_, digest, prompt, sampling, others, value.get("metadata"), line=line)
        row.request(Request(()))  # raises for values out of range
        return row
    except Exception as error:  # noqa: BLE001 (whatever it is, it is this row's, and the others go on)
        return InputRow(index, id_, digest, error=str(of_item(error)), line=line)


def _parsed(line: bytes) -> Any:
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
        if max(text.count("["), text.count("{")) > _DEEPEST:
            _check_depth(text)
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise UsageError(f"not valid JSON ({error})") from None


def _check_depth(text: str) -> None:
    """The parser descends for each bracket that is open; one in a string counts here too, which does no harm."""
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > _DEEPEST:
            raise UsageError(f"more than {_DEEPEST} levels of JSON")


def _refuse_constant(name: str) -> None:
    raise UsageError(f"not valid JSON ({name} is no number)")


def _finite(digits: str) -> float:
    """A number that can be written again: JSON has no infinity."""
    number = float(digits)
    if not math.isfinite(number):
        raise UsageError(f"the number {digits:.40} is too large")
    return number


def _id(value: Mapping[str, Any], index: int) -> str | int:
    id_ = value.get("id", index)
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise UsageError("`id` must be a string or a whole number")
    return id_


def _prompt(value: Mapping[str, Any]) -> Any:
    if ("prompt" in value) == ("messages" in value):
        raise UsageError("give one of `prompt` and `messages`")
    if "prompt" in value:
        if not isinstance(value["prompt"], str):
            raise UsageError("`prompt` must be a string")
        return value["prompt"]
    return check_messages(value["messages"])


def _chosen(value: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    chosen = {name: value[name] for name in types if name in value}
    for name, given in chosen.items():
        if isinstance(given, bool) or not isinstance(given, types[name]):
            wanted = " or ".join(_WORDS[type_] for type_ in types[name] if type_ is not int or len(types[name]) == 1)
            raise UsageError(f"`{name}` must be {wanted}")
    return {name: _number(name, given) if types[name] is _NUMBER else given for name, given in chosen.items()}


def _number(name: str, given: float) -> float:
    """Torch takes no whole number beyond 64 bits."""
    try:
        return given if type(given) is int and given.bit_length() < 64 else float(given)
    except OverflowError:
        raise UsageError(f"`{name}` is too large a number") from None


_WORDS = {int: "a whole number", float: "a number", dict: "an object", str: "a string", list: "a list of strings"}


def _logit_bias(given: Mapping[str, Any]) -> dict[int, float]:
    if not all(key.isdecimal() and type(bias) in _NUMBER for key, bias in given.items()):
        raise UsageError("`logit_bias` must map token ids to numbers")
    longest = max(map(len, given), default=0)
    if longest > _ID_DIGITS:
        raise UsageError(f"`logit_bias` has a token id of {longest} digits")
    return {int(key): _number("logit_bias", bias) for key, bias in given.items()}


def _constraint(given: Mapping[str, Any]) -> Constraint | None:
    if len(given) > 1:
        raise UsageError("give one of `json_schema`, `regex` and `grammar`")
    if "json_schema" in given:
        return Constraint("json-schema", json.dumps(given["json_schema"]))
    if "grammar" in given:
        return Constraint("grammar", given["grammar"])
    return Constraint("regex", given["regex"]) if given else None


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not all(isinstance(stop, str) for stop in stops):
        raise UsageError("`stop` must be a string or a list of strings")
    return tuple(stops)
