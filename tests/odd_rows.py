"""Rows that no one should send, and some that anyone may: for `kvgen batch` to get through without an end."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from kvgen.pipeline.rows import SAMPLING_FIELDS

# JSON that Python's own writer would not write stands as these words until the line is made.
_RAW = {"@huge@": "1e400", "@digits@": "9" * 5000, "@minus@": "-1e400"}
_HUGE, _DIGITS, _MINUS = _RAW

NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 0.5, 0.999999, 1e-45, 1e-320, 1e38, 1e39, 1e300, -1e308, 10**23, -(10**23), 10**400, True, None),
    *(2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), float("nan"), float("inf")),
    *(_HUGE, _DIGITS, _MINUS, "1", "", [], {}, [1], {"a": 1}),
]
TEXTS: list[Any] = [
    *(
        "",
        " ",
        "\n",
        "\x00",
        "a\ud800b",
        "\udcff",
        "\u2028",
        "\ufeff",
        "\x1b[2J",
        "<s>",
        "</s>",
        "<|im_end|>",
        "{{ x }}",
    ),
    *("é" * 300, "word " * 2000, "a" * 20000, "١٢٣", "\u202eabc", "[bold]x[/bold]", None, 3, True, [], {}, ["a"]),
]
KEYS = [
    "99999999",
    "384",
    "383",
    "-1",
    "",
    "٣",
    "1.0",
    "0x1",
    "1e3",
    " 1",
    "9" * 5000,
    str(2**31),
    str(2**63),
    "01",
    "1",
]
BIASES: list[Any] = [0, 5, -5, 1e6, -1e6, 1e7, 10**23, 10**400, _HUGE, float("nan"), None, True, "1", []]
STOPS: list[Any] = ["", [""], ["\ud800"], [1], [], "e", ["a"] * 500, "x" * 10000, [["a"]], {"a": 1}, None]
COUNTS: list[Any] = [1, 2, 3, 0, -1, 2**31, 2**63, 10**30, _DIGITS, _HUGE, 1.0, "3", True, None]
IDS: list[Any] = ["", "same", 0, -1, 10**100, _DIGITS, _HUGE, 1.5, True, None, "a\ud800", "line\nbreak", [], {}]
CONSTRAINTS: list[tuple[str, Any]] = [
    *(
        ("regex", text)
        for text in ("", "(", "[^", "a{100000}", "(a*)*", ".*", r"\p{L}+", "\ud800", "a\udcff", r"(?=a)", r"\b")
    ),
    *(("regex", text) for text in ("(" * 200, "x" * 20000, "[ab ]{3}", "\x00", None, 3)),
    *(
        ("grammar", text)
        for text in ("", "start: ", "start: start", "start: /a/", 'start: "a" start |', "\ud800", "%json {}")
    ),
    *(
        ("grammar", text)
        for text in ("start: /(/", "nothing", "start: missing", 'start: "' + "a" * 9999 + '"', None, {})
    ),
    *(
        ("json_schema", schema)
        for schema in ({}, {"type": "nope"}, {"$ref": "#"}, {"$ref": "#/nowhere"}, {"pattern": "("})
    ),
    *(
        ("json_schema", schema)
        for schema in ({"type": "string", "pattern": "\ud800"}, {"enum": []}, {"enum": [_HUGE]}, True)
    ),
    ("json_schema", {"type": "integer", "minimum": 5, "maximum": 1}),
    ("json_schema", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    ("json_schema", {"type": "array", "minItems": 10**9}),
    ("json_schema", {"multipleOf": 0}),
    ("json_schema", {"type": "string", "maxLength": 2**63}),
]
LINES = [
    *(
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b"null",
        b"1",
        b"[]",
        b"{}",
        b"true",
        b'"',
        b"[" * 5000,
        b'{"a":' * 5000,
        b"NaN",
        b"\x00",
    ),
    *(
        b'{"prompt": "a", "prompt": "b"}',
        b'"a" "b"',
        b'{"prompt": "a"},',
        b"1e400",
        b"9" * 5000,
        b'"\\ud800"',
        b'"\\u0000"',
    ),
]


def odd_rows(count: int, seed: int) -> Iterator[tuple[bytes, bool]]:
    """Lines without their breaks, and whether each is plain, and completes whatever stands beside it."""
    chance = random.Random(seed)
    for number in range(count):
        kind = chance.random()
        if kind < 0.35:
            yield json.dumps(_plain(chance, number)).encode(), True
        elif kind < 0.42:
            yield chance.choice(LINES), False
        else:
            row = _plain(chance, number)
            for _ in range(chance.choice((1, 1, 2, 3))):
                _spoil(row, chance)
            yield _line(row), False


def _plain(chance: random.Random, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": f"the {chance.choice(('red', 'blue', 'old'))} {number}",
        "max_tokens": chance.randint(1, 5),
    }
    if chance.random() < 0.5:
        row |= {"temperature": chance.choice((0.5, 1, 2)), "top_p": 0.9, "seed": number}
    return row


def _spoil(row: dict[str, Any], chance: random.Random) -> None:
    """Put something odd into a row."""
    part = chance.randrange(9)
    if part == 0:
        row["prompt"] = chance.choice(TEXTS)
    elif part == 1:
        row["logit_bias"] = {chance.choice(KEYS): chance.choice(BIASES) for _ in range(chance.randint(0, 3))}
    elif part == 2:
        row["stop"] = chance.choice(STOPS)
    elif part == 3:
        row["max_tokens"] = chance.choice(COUNTS)
    elif part == 4:
        row["id"] = chance.choice(IDS)
    elif part == 5:
        row["metadata"] = chance.choice([*TEXTS, *NUMBERS, {"deep": [[[[_HUGE]]]]}, {"\ud800": 1}])
    elif part == 6:
        name, given = chance.choice(CONSTRAINTS)
        row[name] = given
    elif part == 7:
        row[chance.choice(("unknown", "", "prompt ", "messages"))] = chance.choice(
            [*TEXTS, [{"role": "user", "content": "x"}]]
        )
    else:
        row[chance.choice(sorted(SAMPLING_FIELDS))] = chance.choice(NUMBERS)


def _line(row: dict[str, Any]) -> bytes:
    text = json.dumps(row)
    for word, raw in _RAW.items():
        text = text.replace(f'"{word}"', raw)
    return text.encode()
