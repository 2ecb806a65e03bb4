"""`kvgen serve` with real clients: curl, `llm`, and what the openai package does beyond plain requests."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

import kvgen
from tests.program import run
from tests.test_server import PROMPT, QUESTION, SCHEMA, Served, generated, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[Served]:
    with serving("-m", str(smollm2_path), "--name", "smollm2") as served:
        yield served


@pytest.fixture(scope="module")
def answer(smollm2: kvgen.Loaded) -> str:
    return "".join(chunk.text for chunk in kvgen.chat(smollm2, QUESTION, kvgen.Sampling(temperature=0)))


class Capital(pydantic.BaseModel):
    capital: str


# --- curl -------------------------------------------------------------------------------------------------------------


def curl(server: Served, path: str, body: Any, *options: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    data = body if isinstance(body, str) else json.dumps(body)
    command = ["curl", "--silent", "--show-error", "--max-time", "120", *options, "--data", data]
    command += ["--header", "Content-Type: application/json", f"http://127.0.0.1:{server.port}{path}"]
    return subprocess.run(command, capture_output=True, text=True)


def events(text: str) -> list[Any]:
    """The pieces of a stream, without its end."""
    *lines, last = [line for line in text.splitlines() if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_curl_gets_the_text_of_the_command_line(server: Served, smollm2_path: Path) -> None:
    expected = run("generate", PROMPT, "--seed", "4", "-n", "12", "-m", str(smollm2_path)).stdout
    body = {"prompt": PROMPT, "seed": 4, "max_tokens": 12}
    whole = json.loads(curl(server, "/v1/completions", body).stdout)
    assert whole["choices"][0]["text"] + "\n" == expected
    pieces = events(curl(server, "/v1/completions", {**body, "stream": True}, "--no-buffer").stdout)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) + "\n" == expected
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-2:] == [None, "length"]


def test_curl_chats_with_log_probabilities_and_a_schema(server: Served, answer: str) -> None:
    body = {"messages": QUESTION, "temperature": 0}
    whole = json.loads(curl(server, "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 1}).stdout)
    assert whole["choices"][0]["message"]["content"] == answer
    tokens = whole["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens[:-1]) == answer  # the last one ends the answer
    assert all(token["top_logprobs"][0]["token"] == token["token"] for token in tokens)
    schema = {"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA}}
    stream = curl(server, "/v1/chat/completions", {**body, "response_format": schema, "stream": True})
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in events(stream.stdout))
    assert json.loads(text)["capital"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [('{"prompt": ', "400", "JSON"), ('{"prompt": "x", "best": 1}', "400", "`best`"), ('{"model": "x"}', "404", "x")],
)
def test_curl_sees_errors_as_a_status_and_json(server: Served, body: str, status: str, message: str) -> None:
    result = curl(server, "/v1/completions", body, "--write-out", "\n%{http_code}")
    text, code = result.stdout.rsplit("\n", 1)
    assert (result.returncode, code) == (0, status)
    assert message in json.loads(text)["error"]["message"]


def test_a_curl_that_is_killed_frees_its_row(server: Served) -> None:
    result = curl(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 8000}, "--max-time", "1")
    assert result.returncode == 28
    server.wait_until_idle()


# --- openai -----------------------------------------------------------------------------------------------------------


def test_openai_parses_an_answer_into_a_model(server: Served) -> None:
    parsed = server.client.chat.completions.parse(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=60, response_format=Capital
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital)


def test_openai_streams_log_probabilities(server: Served, answer: str) -> None:
    with server.client.chat.completions.stream(
        model="smollm2", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == answer
    assert "".join(token.token for token in final.choices[0].logprobs.content[:-1]) == answer


def test_openai_tasks_that_are_cancelled_free_their_rows(server: Served, smollm2: kvgen.Loaded) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
            long = asyncio.create_task(client.completions.create(model="smollm2", prompt=PROMPT, max_tokens=8000))
            short = await client.completions.create(model="smollm2", prompt=PROMPT, max_tokens=8, seed=6)
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            return short.choices[0].text

    assert asyncio.run(ask()) == generated(smollm2, PROMPT, seed=6, max_tokens=8)
    server.wait_until_idle()


# --- llm --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(server: Served, tmp_path: Path) -> Any:
    """Run llm, with the server as two of its models."""
    pytest.importorskip("llm", reason="the command llm: pip install llm")
    address = f"http://127.0.0.1:{server.port}/v1"
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: chat, model_name: smollm2, api_base: '{address}', supports_schema: true}}\n"
        f"- {{model_id: text, model_name: smollm2, api_base: '{address}', completion: true}}\n"
        f"- {{model_id: wrong, model_name: other, api_base: '{address}'}}\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    environment["LLM_USER_PATH"] = str(tmp_path)

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)

    return ask


@pytest.mark.parametrize("stream", [(), ("--no-stream",)])
def test_llm_chats(llm: Any, answer: str, stream: tuple[str, ...]) -> None:
    result = llm("-m", "chat", QUESTION[0]["content"], "-o", "temperature", "0", *stream)
    assert (result.returncode, result.stdout) == (0, f"{answer}\n"), result.stderr


def test_llm_completes_with_log_probabilities(llm: Any, smollm2: kvgen.Loaded) -> None:
    options = ("-o", "seed", "3", "-o", "max_tokens", "10", "-o", "logprobs", "2")
    result = llm("-m", "text", PROMPT, *options)
    assert (result.returncode, result.stdout) == (0, generated(smollm2, PROMPT, seed=3, max_tokens=10) + "\n")
    (logged,) = json.loads(llm("logs", "list", "--json", "-n", "1").stdout)
    assert len(logged["response_json"]["logprobs"]) == 10


def test_llm_gets_an_answer_in_a_schema_and_continues_a_conversation(llm: Any, smollm2: kvgen.Loaded) -> None:
    question = ("-m", "chat", QUESTION[0]["content"], "-o", "temperature", "0")
    result = llm(*question, "--schema", json.dumps(SCHEMA))
    assert json.loads(result.stdout)["capital"] in ("Paris", "Rome"), result.stderr
    first = llm(*question).stdout.strip()
    more = [*QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "And of Peru?"}]
    expected = "".join(chunk.text for chunk in kvgen.chat(smollm2, more, kvgen.Sampling(temperature=0), max_tokens=12))
    second = llm("-c", "And of Peru?", "-o", "temperature", "0", "-o", "max_tokens", "12")
    assert second.stdout.strip() == expected.strip(), second.stderr


def test_llm_shows_errors(llm: Any) -> None:
    result = llm("-m", "wrong", "hi")
    assert (result.returncode, "does not exist here" in result.stderr) == (1, True)
