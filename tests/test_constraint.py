"""Structured output: every completion that ends by itself is what was asked for, alone and in a batch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import kvgen
from kvgen import Sampling, UsageError
from kvgen.generation.batch import Batch
from kvgen.generation.settings import Constraint, Request
from kvgen.loading.load import Loaded
from tests.program import run

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PROMPT = "A record of a person, in JSON: "
GRAMMAR = 'start: "yes" | "no" " " NUMBER\nNUMBER: /[0-9]{1,3}/'


def completion(loaded: Loaded, constraint: Constraint, seed: int, max_tokens: int = 120) -> tuple[str, str | None]:
    sampling = Sampling(temperature=1.2, top_p=1.0, seed=seed)
    chunks = list(kvgen.stream(loaded, PROMPT, sampling, max_tokens=max_tokens, constraint=constraint))
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


def is_a_record(text: str) -> bool:
    value = json.loads(text)
    return (
        value.keys() == {"name", "age", "tags"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 20
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and set(value["tags"]) <= {"a", "b"}
        and len(value["tags"]) <= 3
    )


@pytest.mark.parametrize("seed", range(6))
def test_json_is_valid_by_its_schema_at_any_temperature(smollm2: Loaded, seed: int) -> None:
    text, reason = completion(smollm2, Constraint("json-schema", json.dumps(SCHEMA)), seed)
    assert reason == "eos"
    assert is_a_record(text)


@pytest.mark.parametrize("seed", range(4))
def test_regular_expressions_and_grammars_are_followed(smollm2: Loaded, seed: int) -> None:
    text, reason = completion(smollm2, Constraint("regex", r"[a-f]{3}-\d{2,4}(é|ß)"), seed)
    assert (reason, bool(re.fullmatch(r"[a-f]{3}-\d{2,4}(é|ß)", text))) == ("eos", True)
    text, reason = completion(smollm2, Constraint("grammar", GRAMMAR), seed)
    assert (reason, bool(re.fullmatch(r"yes|no \d{1,3}", text))) == ("eos", True)


def test_what_is_cut_off_says_so(smollm2: Loaded) -> None:
    text, reason = completion(smollm2, Constraint("json-schema", json.dumps(SCHEMA)), 0, max_tokens=5)
    assert reason == "length"
    with pytest.raises(ValueError, match=r"."):
        json.loads(text)


def test_rows_of_a_batch_follow_their_own_constraints(smollm2: Loaded) -> None:
    prompt = smollm2.tokenizer.encode(PROMPT)
    kinds = [
        Constraint("json-schema", json.dumps(SCHEMA)),
        None,
        Constraint("regex", "[xyz]+!"),
        Constraint("regex", "("),
    ]
    requests = [Request(prompt, Sampling(temperature=1, seed=n), 60, constraint=kind) for n, kind in enumerate(kinds)]
    texts: dict[int, str] = {}
    errors: dict[int, str] = {}
    for number, event in Batch(smollm2).run(iter(requests)):
        if isinstance(event, kvgen.KvgenError):
            errors[number] = str(event)
        else:
            texts[number] = texts.get(number, "") + event.text
    alone = kvgen.generate(smollm2, prompt, requests[1].sampling, max_tokens=60)
    assert is_a_record(texts[0])
    assert texts[1] == alone
    assert re.fullmatch("[xyz]+!", texts[2]) or len(texts[2]) >= 60
    assert list(errors) == [3] and errors[3].startswith("regex cannot be used: ")


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("json-schema", "{"),
        Constraint("json-schema", '{"type": "nonsense"}'),
        Constraint("regex", "(unclosed"),
        Constraint("grammar", "start: nothing"),
    ],
)
def test_a_constraint_that_is_not_valid_is_refused(smollm2: Loaded, constraint: Constraint) -> None:
    with pytest.raises(UsageError, match=f"{constraint.kind} cannot be used"):
        completion(smollm2, constraint, 0)


@pytest.mark.parametrize(
    "constraint", [Constraint("json-schema", '{"type": "string", "pattern": "(?=a)"}'), Constraint("regex", "(?=a)")]
)
def test_what_is_wrong_with_a_regular_expression_is_told(smollm2: Loaded, constraint: Constraint) -> None:
    with pytest.raises(UsageError, match=r"regex parse error: look-around, .* is not supported$"):
        completion(smollm2, constraint, 0)


def test_a_tokenizer_without_an_end_cannot_follow(tiny_llama) -> None:
    loaded = kvgen.load(tiny_llama()[0], tokenizer="ids")
    with pytest.raises(UsageError, match="end token"):
        kvgen.generate(loaded, [3, 4], constraint=Constraint("regex", "a"))


def test_drafts_do_not_change_what_is_allowed(smollm2: Loaded) -> None:
    prompt = smollm2.tokenizer.encode("x y x y x y x y ")
    options = {"max_tokens": 30, "constraint": Constraint("regex", "([xy] ?){4,30}!")}
    greedy = Sampling(temperature=0)
    plain = kvgen.generate(smollm2, prompt, greedy, **options)
    assert kvgen.generate(smollm2, prompt, greedy, drafter=kvgen.PromptLookup(), **options) == plain
    assert re.fullmatch("[xy !]+", plain)


def test_the_options_of_the_command_line(smollm2_path: Path, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text(GRAMMAR)
    assert is_a_record(run("generate", "-p", PROMPT, "--json-schema", str(schema), "-n", "120").stdout)
    assert re.fullmatch(r"yes|no \d{1,3}", run("generate", "-p", "2 > 1? ", "--grammar", str(grammar)).stdout.strip())
    row = json.dumps({"prompt": PROMPT, "json_schema": SCHEMA}) + "\n"
    assert is_a_record(json.loads(run("batch", "-n", "120", "--regex", "[ab]{2}", input=row).stdout)["completion"])
    both = run("generate", "-p", "x", "--regex", "a", "--grammar", str(grammar))
    assert (both.returncode, both.stderr) == (
        2,
        "kvgen: error: give one of --json-schema, --regex and --grammar\n",
    )
    missing = run("generate", "-p", "x", "--json-schema", "/nowhere.json")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "/nowhere.json: cannot be read" in missing.stderr
