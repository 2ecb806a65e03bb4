"""`kvgen serve` as a real process, with the openai package and plain HTTP as its clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import openai
import pytest
import uvicorn
from starlette.requests import Request
from uvicorn.server import ServerState

import kvgen
from kvgen.cli.sockets import tcp_socket
from kvgen.errors import ContextError
from kvgen.generation.step import Step
from kvgen.server.answers import Answer, as_json
from kvgen.server.app import Limits, Server
from kvgen.server.run import Protocol
from kvgen.server.schema import Job, parse_chat, parse_completion
from kvgen.server.tools import template_messages, tool_calls
from tests.program import KVGEN, run, start

PROMPT = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
SCHEMA = {"type": "object", "properties": {"capital": {"enum": ["Paris", "Rome"]}}, "required": ["capital"]}


class Served:
    """A server process. lines: its log so far."""

    def __init__(self, process: ForkServerProcess, log: TextIO) -> None:
        self.process, self.lines = process, list[str]()
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=[log], daemon=True)
        self._reader.start()
        self.port = int(self.wait_for(r"^serving .* on http://127\.0\.0\.1:(\d+)/v1")[1])

    def _read(self, log: TextIO) -> None:
        for line in log:
            with self._more:
                self.lines.append(line.rstrip("\n"))
                self._more.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log."""
        with self._more:
            found = self._more.wait_for(
                lambda: next(filter(None, (re.search(pattern, line) for line in self.lines)), None), 120
            )
        assert found, self.lines
        return found

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid or 0, number)

    def end(self) -> int | None:
        """Wait for the end of the process, and of its log; return its exit code."""
        self.process.join(120)
        self._reader.join(120)
        return self.process.exitcode

    def request(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
        """Return the status and the decoded body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text.startswith("{") else text

    def metric(self, name: str) -> float:
        _, text = self.request("GET", "/metrics")
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    def wait_until_idle(self) -> None:
        """Wait until no request is in progress."""
        deadline = time.monotonic() + 60
        while self.metric("kvgen_requests_running") + self.metric("kvgen_requests_waiting"):
            assert time.monotonic() < deadline, "requests stay in progress"

    @property
    def client(self) -> openai.OpenAI:
        plain = openai.DefaultHttpxClient(verify=False)  # to read certificates takes longer than most answers
        address = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=address, api_key="none", max_retries=0, http_client=plain)


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Served]:
    read, write = os.pipe()
    env = {**os.environ, **environment}
    with os.fdopen(read) as log, start("serve", "--port", "0", *arguments, stderr=write, env=env) as (_, _, process):
        os.close(write)
        yield Served(process, log)


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[Served]:
    with serving("-m", str(smollm2_path), "--name", "smollm2") as served:
        yield served


def generated(loaded: kvgen.Loaded, prompt: Any, **settings: Any) -> str:
    most = settings.pop("max_tokens", 16)
    return kvgen.generate(loaded, prompt, kvgen.Sampling(**settings), max_tokens=most)


# --- Texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 7])
def test_a_completion_is_that_of_generate(server: Served, smollm2: kvgen.Loaded, seed: int) -> None:
    answer = server.client.completions.create(model="smollm2", prompt=PROMPT, max_tokens=16, seed=seed)
    assert answer.choices[0].text == generated(smollm2, PROMPT, seed=seed)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)


def test_a_conversation_is_that_of_chat_and_its_stream_adds_up(server: Served, smollm2: kvgen.Loaded) -> None:
    expected = "".join(chunk.text for chunk in kvgen.chat(smollm2, QUESTION, kvgen.Sampling(temperature=0)))
    whole = server.client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (expected, "stop")
    stream = server.client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == expected
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-2:] == [None, "stop"]
    assert pieces[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": pieces[-1].usage.prompt_tokens_details}
    )


def test_several_choices_have_successive_seeds_and_prompts_may_be_ids(server: Served, smollm2: kvgen.Loaded) -> None:
    ids = smollm2.tokenizer.encode(PROMPT)
    answer = server.client.completions.create(model="smollm2", prompt=[ids, ids[:3]], n=2, max_tokens=6, seed=3)
    expected = [generated(smollm2, given, seed=seed, max_tokens=6) for given in (ids, ids[:3]) for seed in (3, 4)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == 8


def test_many_clients_get_the_texts_that_each_would_get_alone(server: Served, smollm2: kvgen.Loaded) -> None:
    def ask(seed: int) -> str:
        settings = {"model": "smollm2", "prompt": f"{PROMPT} {seed % 3}", "max_tokens": 8, "seed": seed}
        return server.client.completions.create(**settings).choices[0].text

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(24)))
    assert texts == [generated(smollm2, f"{PROMPT} {seed % 3}", seed=seed, max_tokens=8) for seed in range(24)]


def test_stop_bias_penalties_and_own_settings_reach_the_sampler(server: Served, smollm2: kvgen.Loaded) -> None:
    settings = {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "seed": 5}
    own = {"top_k": 40, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.1}
    bias = {7042: -100}
    answer = server.client.completions.create(
        model="smollm2", prompt=PROMPT, max_tokens=12, logit_bias=bias, **settings, extra_body=own
    )
    assert answer.choices[0].text == generated(smollm2, PROMPT, max_tokens=12, logit_bias=bias, **settings, **own)
    stopped = server.client.completions.create(model="smollm2", prompt=PROMPT, temperature=0, stop=["."])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (" Paris", "stop")


def test_log_probabilities_are_those_of_the_model(server: Served, smollm2: kvgen.Loaded) -> None:
    chunks = list(kvgen.stream(smollm2, PROMPT, kvgen.Sampling(temperature=0), max_tokens=3, top_logprobs=2))
    old = server.client.completions.create(model="smollm2", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2)
    logprobs = old.choices[0].logprobs
    assert logprobs.token_logprobs == [chunk.step.logprob for chunk in chunks]
    assert logprobs.tokens == [" Paris", ".", "\n"] and logprobs.text_offset == [0, 6, 7]
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2]
    chat = server.client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=2, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert [len(token.top_logprobs) for token in content] == [3, 3]
    assert content[0].logprob == content[0].top_logprobs[0].logprob < 0


def test_parts_of_a_character_have_names_of_their_own_and_offsets_in_the_text(server: Served) -> None:
    body = {"prompt": "\U0001f600\U0001f603", "max_tokens": 6, "temperature": 0, "logprobs": 3}
    _, answer = server.request("POST", "/v1/completions", body)
    choice = answer["choices"][0]
    logprobs, offsets = choice["logprobs"], choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"]) < len(offsets)
    assert [len(top) for top in logprobs["top_logprobs"]] == [3] * 6
    assert all(token.startswith("token_id:") or token in choice["text"] for token in logprobs["tokens"])
    stream = server.client.completions.create(model="smollm2", **body, stream=True)
    assert [piece.choices[0].logprobs.text_offset[0] for piece in stream] == offsets


@pytest.mark.parametrize("chat", [True, False])
def test_log_probabilities_of_ruled_out_tokens_are_numbers(smollm2: kvgen.Loaded, chat: bool) -> None:
    step = Step(5, 3, 0, "length", -math.inf, ((6, -1.5), (7, -math.inf)))
    answer = Answer(Job((kvgen.Request([1, 2, 3]),), chat), "m", smollm2.tokenizer)
    answer.choices[0].chunks.append(kvgen.Chunk("x", step, "length"))
    text = json.dumps(answer.whole(), allow_nan=False)
    assert text.count("-9999.0") == 2 and "-1.5" in text


def test_an_answer_in_a_json_schema(server: Served) -> None:
    answer = server.client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Name a capital."}],
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "capital", "schema": SCHEMA}},
    )
    assert json.loads(answer.choices[0].message.content)["capital"] in ("Paris", "Rome")


def test_tool_calls_are_parsed_back_and_other_text_stays() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome \u00e9"}}\n</tool_call>'
    text, (found,) = tool_calls(f"Let me see.\n{call}")
    assert text == "Let me see."
    assert (found["type"], found["function"]["name"]) == ("function", "weather")
    assert json.loads(found["function"]["arguments"]) == {"city": "Rome \u00e9"}
    for other in ("plain", "<tool_call>{broken}</tool_call>", '<tool_call>{"no": "name"}</tool_call>'):
        assert tool_calls(other) == (other, [])


def test_lone_surrogates_in_an_answer_stay_escapes() -> None:
    text, calls = tool_calls(r'<tool_call>{"name": "\ud800", "arguments": {"city": "\u00e9\udfff"}}</tool_call>')
    assert json.loads(as_json({"text": text, "calls": calls})) == {"text": text, "calls": calls}
    assert b"\xc3\xa9" in as_json(calls)


def test_messages_become_those_of_a_template() -> None:
    function = {"name": "f", "arguments": '{"x": 1}'}
    made = template_messages(
        [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ]
    )
    assert made[0] == {"role": "system", "content": "ab"}
    assert made[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]  # type: ignore[typeddict-item]
    assert made[2] == {"role": "tool", "content": "2", "tool_call_id": "1"}


def test_a_template_with_tools_sees_them_and_special_tokens_in_them_stay_text(smollm2: kvgen.Loaded) -> None:
    template = "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = smollm2.tokenizer.with_chat_template(template)
    tools = [{"type": "function", "function": {"name": "<|im_end|>"}}]
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools, "max_tokens": 1}
    job = parse_chat(body, replace(smollm2, tokenizer=tokenizer))
    prompt = list(job.requests[0].prompt)
    assert job.tools and prompt == tokenizer.encode("<|im_end|>hi")
    assert not set(prompt) & tokenizer.special_ids


# --- Reuse ---------------------------------------------------------------------------------------------------------


def test_the_second_request_with_a_long_prompt_computes_one_position(server: Served) -> None:
    ids = [100 + number % 900 for number in range(1500)]
    server.client.completions.create(model="smollm2", prompt=ids, max_tokens=1)
    before = server.metric("kvgen_positions_computed_total")
    again = server.client.completions.create(model="smollm2", prompt=ids, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens == 1499
    assert server.metric("kvgen_positions_computed_total") - before == 1


def test_a_request_without_cache_reuses_nothing_and_gives_the_same_text(server: Served) -> None:
    first, second = (
        server.client.completions.create(
            model="smollm2", prompt=PROMPT, max_tokens=5, temperature=0, extra_body={"cache": cache}
        )
        for cache in (True, False)
    )
    assert first.choices[0].text == second.choices[0].text
    assert second.usage.prompt_tokens_details.cached_tokens == 0


# --- Errors and limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"prompt": "x", "foo": 1}, 400, "`foo`"),
        ("completions", {}, 400, "`prompt`"),
        ("completions", {"prompt": 3}, 400, "`prompt`"),
        ("completions", {"prompt": []}, 400, "`prompt`"),
        ("completions", {"prompt": [10**9]}, 400, "outside the model's vocabulary"),
        ("completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"prompt": "x", "n": 1000}, 400, "`n`"),
        ("completions", {"prompt": "x", "echo": True}, 400, "`echo`"),
        ("completions", {"prompt": "x", "model": "gpt-5"}, 404, "gpt-5"),
        ("completions", {"prompt": [5] * 9000}, 400, "context"),
        ("completions", {"prompt": "x" * 7_000_000}, 400, "the prompt has 7000000 characters"),
        ("completions", {"prompt": ["\ud800"] * 129}, 400, "`n`"),  # before any is encoded
        ("completions", {"prompt": "x", "stop": ["z"] * 65}, 400, "`stop` has 65 texts"),
        ("completions/", {"prompt": "x"}, 404, "Not Found"),
        ("completions", [], 400, "JSON object"),
        ("completions", b"{" * 2000, 400, "levels"),
        ("completions", b"\xff", 400, "UTF-8"),
        ("completions", b'{"prompt": "x", "\\ud800": 1}', 400, "`\ud800`"),
        ("completions", {"prompt": "x", "regex": r"[^\s\S]"}, 400, "no text follows it"),
        (
            "completions",
            {"prompt": "x", "regex": "((a?){900}a{900}){900}", "temperature": 0},
            400,
            "cannot be followed",
        ),
        ("completions", {"prompt": "x", "json_schema": {"$ref": "#"}}, 400, "no text follows it"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": QUESTION * 8193}, 400, "there are 8193 messages"),
        ("chat/completions", {"messages": [{**QUESTION[0], "content": "x" * 7_000_000}]}, 400, "characters"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "`content`"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, 400, "`content`"),
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": []}]}, 400, "`content`"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "`role`"),
        ("chat/completions", {"messages": [{"content": "x"}]}, 400, "`role`"),
        ("chat/completions", {"messages": [{**QUESTION[0], "name": 1}]}, 400, "`name`"),
        ("chat/completions", {"messages": [{**QUESTION[0], "tool_calls": 1}]}, 400, "`tool_calls`"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        ("chat/completions", {"messages": QUESTION, "tools": [{"function": {"name": "f"}}]}, 400, "`tools`"),
        ("chat/completions", {"messages": QUESTION, "response_format": {"type": "xml"}}, 400, "`response_format`"),
        ("chat/completions", {"messages": QUESTION, "top_logprobs": 3}, 400, "`top_logprobs`"),
    ],
)
def test_bad_requests_are_named_and_change_nothing(
    server: Served, path: str, body: Any, status: int, message: str
) -> None:
    found, answer = server.request("POST", f"/v1/{path}", body)
    assert found == status
    assert message in answer["error"]["message"]
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_errors_name_the_field(server: Served) -> None:
    for name, value in (("foo", 1), ("temperature", "hot"), ("max_tokens", 0), ("stop", ["z"] * 65), ("n", 1000)):
        _, answer = server.request("POST", "/v1/completions", {"prompt": "x", name: value})
        assert answer["error"]["param"] == name


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_queued(smollm2: kvgen.Loaded) -> None:
    with pytest.raises(ContextError, match="the prompt has 8192 tokens"):
        parse_completion({"prompt": [5] * 8192, "n": 2}, smollm2)
    assert len(parse_completion({"prompt": [5] * 8192, "n": 2, "max_context": 99}, smollm2).requests) == 2


def test_a_body_is_decoded_beside_other_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr("kvgen.server.app.parse_json", lambda data: threads.append(threading.current_thread()) or {})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    server: Any = SimpleNamespace(limits=Limits())
    assert asyncio.run(Server.body(server, Request(scope, receive))) == {}
    assert threads != [threading.current_thread()]


def test_a_prompt_that_cannot_fit_has_the_code_of_a_long_one(server: Served) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x" * 7_000_000}),
        ("/v1/completions", {"prompt": [5] * 9000}),
        ("/tokenize", {"prompt": "x" * 7_000_000}),
    ):
        assert server.request("POST", path, body)[1]["error"]["code"] == "context_length_exceeded"


def test_other_content_types_hosts_and_methods_are_refused(server: Served) -> None:
    assert server.request("POST", "/v1/completions", {"prompt": "x"}, {"Content-Type": "text/plain"})[0] == 415
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "", "[", "::1"):
        status, answer = server.request("GET", "/v1/models", headers={"Host": host})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), host
        assert "Host" in answer["error"]["message"]
    for host in ("localhost", "LOCALHOST:80", "[::1]:80", "127.0.0.1"):
        assert server.request("GET", "/v1/models", headers={"Host": host})[0] == 200
    assert server.request("GET", "/v1/completions")[0] == 405
    assert server.request("POST", "/v1/nothing", {})[0] == 404
    assert server.request("GET", "/health") == (200, {"status": "ok"})


def test_openai_errors_are_raised_by_its_client(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="foo"):
        server.client.completions.create(model="smollm2", prompt="x", extra_body={"foo": 1})
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="other", prompt="x")
    assert [model.id for model in server.client.models.list()] == ["smollm2"]


def test_a_client_that_leaves_frees_its_row(server: Served) -> None:
    stream = server.client.completions.create(model="smollm2", prompt=PROMPT, max_tokens=5000, stream=True)
    next(iter(stream))
    assert server.metric("kvgen_requests_running") == 1
    stream.close()
    body = json.dumps({"prompt": PROMPT, "max_tokens": 5000}).encode()
    plain = socket.create_connection(("127.0.0.1", server.port))
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    plain.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    deadline = time.monotonic() + 60
    while server.metric("kvgen_requests_running") != 1 and time.monotonic() < deadline:
        pass
    plain.close()
    server.wait_until_idle()
    server.wait_for("^POST /v1/completions 499: the client left$")
    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", "{"]).encode())
    server.wait_for("^POST /v1/completions 499: the client left before it had sent the body$")
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.parametrize(
    "sent", [b"", b"POST / HTTP/1.1\r\nHo", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1"]
)
def test_a_client_that_sends_no_whole_request_is_let_go(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def ask() -> bytes:
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        config.load()
        make = partial(Protocol, config, ServerState(), {})
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(sent)
        with suppress(ConnectionResetError):
            return await asyncio.wait_for(reader.read(), 60)
        return b""

    monkeypatch.setattr("kvgen.server.run.SENDING_SECONDS", 0.05)
    assert asyncio.run(ask()) == b""


def test_limits_keys_and_log(smollm2_path: Path) -> None:
    options = ("--batch-size", "1", "--max-waiting", "0", "--max-body", "1KB", "--timeout", "30")
    with serving("-m", str(smollm2_path), *options, KVGEN_API_KEY="secret") as served:
        assert served.request("GET", "/v1/models")[0] == 401
        assert served.request("GET", "/v1/models", headers={"Authorization": "Bearer wrong"})[0] == 401
        key = {"Authorization": "bearer secret"}  # RFC 9110: the scheme has no case
        assert served.request("GET", "/v1/models", headers=key)[0] == 200
        assert served.request("GET", "/health")[0] == 200
        assert served.request("POST", "/v1/completions", {"prompt": "x" * 2000}, key)[0] == 413
        announced = {**key, "Content-Type": "application/json", "Content-Length": "2000", "Expect": "100-continue"}
        with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)) as plain:
            plain.putrequest("POST", "/v1/completions")
            for name, value in announced.items():
                plain.putheader(name, value)
            plain.endheaders()
            assert plain.getresponse().status == 413  # without having sent the body
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="secret", max_retries=0)
        stream = client.completions.create(model=None, prompt="private words", max_tokens=4000, stream=True)  # type: ignore[call-overload]
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=None, prompt="y")  # type: ignore[call-overload]
        assert refused.value.response.headers["retry-after"] == "1"
        stream.close()
        assert "private" not in "\n".join(served.lines)
        served.wait_for("^POST /v1/completions 429")


@pytest.mark.parametrize("first", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_first_signal_lets_rows_end_and_the_second_stops_at_once(
    server: Served, smollm2_path: Path, smollm2: kvgen.Loaded, first: signal.Signals
) -> None:
    with serving("-m", str(smollm2_path), "--name", "smollm2") as served:
        stream = served.client.completions.create(model="smollm2", prompt=PROMPT, max_tokens=60, seed=2, stream=True)
        pieces = iter(stream)
        texts = [next(pieces).choices[0].text]
        served.send_signal(first)
        texts += [piece.choices[0].text for piece in pieces]
        assert "".join(texts) == generated(smollm2, PROMPT, seed=2, max_tokens=60)
        assert served.end() == 0
    with serving("-m", str(smollm2_path), "--name", "smollm2") as served:
        stream = served.client.completions.create(model="smollm2", prompt=PROMPT, max_tokens=8000, stream=True)
        next(iter(stream))
        served.send_signal(first)
        served.wait_for("again to stop at once")  # of two signals at once, a process may get one
        served.send_signal(first)
        assert served.end() == 0
        assert not [line for line in served.lines if "Exception" in line or "Traceback" in line]


def test_the_default_model_has_its_name_in_the_catalogue(smollm2_path: Path) -> None:
    with serving() as served:
        served.wait_for("^serving smollm2 on ")
        client = served.client.completions
        assert client.create(model="smollm2", prompt=PROMPT, max_tokens=1, temperature=0).choices[0].text == " Paris"


def test_an_idle_server_ends(smollm2_path: Path) -> None:
    with serving("-m", str(smollm2_path), "--idle-timeout", "0.5") as served:
        assert served.end() == 0


def test_addresses_that_others_can_reach_need_a_key() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "KVGEN_API_KEY"}
    result = subprocess.run([*KVGEN, "serve", "--host", "0.0.0.0"], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert "KVGEN_API_KEY" in result.stderr


def test_the_body_of_an_answer_does_not_wait_for_its_header_to_be_acknowledged() -> None:
    async def without_delay() -> int:
        accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        with tcp_socket("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listening):
                _, client = await asyncio.open_connection(*listening.getsockname())
                connection = (await accepted).get_extra_info("socket")
                found: int = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                client.close()
                (await accepted).close()
        return found

    assert asyncio.run(asyncio.wait_for(without_delay(), 60))


def test_a_port_in_use_is_one_line(server: Served) -> None:
    result = subprocess.run([*KVGEN, "serve", "--port", str(server.port)], capture_output=True, text=True)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert f"--port {server.port}" in result.stderr


# --- Its own cache, seen from outside ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("thorough", [False, True])
def test_compare_finds_its_cache_equivalent(server: Served, thorough: bool) -> None:
    result = run("compare", "--url", f"http://127.0.0.1:{server.port}", "--json", *["--thorough"] * thorough)
    report = json.loads(result.stdout)
    (pattern,) = [one for one in report["comparisons"][0]["patterns"] if one["pattern"] != "uncached"]
    assert pattern["verdict"] == "equivalent", result.stdout
    assert not [probe for probe in pattern["probes"] if probe["wrong"]]
    assert result.returncode == 0
