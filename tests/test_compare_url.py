"""`kvgen compare --url` against a small server on localhost: honest, noisy, lying, or no such server at all."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvgen.cli.compare_url import complete_kind
from kvgen.comparison.servers.client import Client, LimitError
from kvgen.comparison.servers.comparison import ServerComparison, compare_server
from kvgen.comparison.servers.connect import KINDS, connect
from kvgen.comparison.servers.distance import distance, printed_precision, step_distance
from kvgen.comparison.servers.probes import PROBES, Session, Trial, run_probe
from kvgen.comparison.servers.reference import LIMIT
from kvgen.comparison.servers.server import Answer
from kvgen.comparison.servers.texts import compose
from kvgen.comparison.verdict import Verdict
from kvgen.errors import KvgenError
from tests.lying_server import FAULTS, Toy, answer, serving
from tests.program import run, run_on_terminal

ONLY_THOROUGH = {"window", "claimed hits", "short hits"}


def compare(toy: Toy, kind: str = "llama.cpp", reply: Any = answer, **options: Any) -> ServerComparison:
    limits = {name: options.pop(name) for name in ("max_requests", "max_seconds", "timeout") if name in options}
    with serving(toy, kind, reply) as url:
        client = Client(url, **{"max_requests": 3000, **limits})
        try:
            return compare_server(client, connect(client), "Once upon a time,", **options)
        finally:
            client.close()


def names(result: ServerComparison) -> set[str]:
    return {finding.name for finding in result.findings}


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - ONLY_THOROUGH))
def test_faults_are_found_and_explained(fault: str) -> None:
    kinds = ("llama.cpp", "vllm", "sglang")
    result = compare(Toy(fault), kinds[sorted(FAULTS).index(fault) % 3])
    assert result.verdict is Verdict.DIFFERENT
    assert not FAULTS[fault] or FAULTS[fault] in names(result)


class Unsteady(Toy):
    """One hit in `every` reads halved values."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.hits = every, 0

    def _rows(self, ids: list[int], reused: int, space: str | None) -> tuple[Any, Any, int]:
        keys, values, further = super()._rows(ids, reused, space)
        self.hits += reused > 0
        if reused and self.hits % self.every == 0:
            values[:reused] *= 0.5
        return keys, values, further


class Limited(Toy):
    """Of a longer hit, what is beyond 64 positions is lost."""

    def _rows(self, ids: list[int], reused: int, space: str | None) -> tuple[Any, Any, int]:
        keys, values, further = super()._rows(ids, reused, space)
        if reused > 64:
            keys, values = (np.concatenate((part[:64], part[reused:])) for part in (keys, values))
        return keys, values, further


AT_TIMES = [(Unsteady(every), "not deterministic") for every in (4, 5, 13)]


@pytest.mark.parametrize(("toy", "cause"), [*AT_TIMES, (Limited(), "beyond a length")])
def test_a_fault_of_some_hits_is_not_blamed_on_others_or_on_chunks(toy: Toy, cause: str) -> None:
    result = compare(toy)
    assert result.verdict is Verdict.DIFFERENT
    assert names(result) == {cause}


class Overwritten(Toy):
    """A hit reads values that the last other prompt left in its place."""

    def _rows(self, ids: list[int], reused: int, space: str | None) -> tuple[Any, Any, int]:
        keys, values, further = super()._rows(ids, reused, space)
        last = self.stored[-1][1] if self.stored else ids
        if reused and last[:2] != ids[:2]:
            values[reused // 2 : reused] *= 0.5
        return keys, values, further


def test_what_other_prompts_leave_is_not_blamed_on_rows_beside() -> None:
    result = compare(Overwritten())
    wrong = {probe.name for probe in result.probes if probe.wrong}
    assert {"after other prompts", "beside others"} <= wrong
    assert "another request's tokens" not in names(result)


def test_hits_that_are_not_numbers_are_named() -> None:
    def reply(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        found = answer(toy, kind, path, body)
        if path == "/v1/completions" and found["usage"]["prompt_tokens_details"]["cached_tokens"]:
            for step in found["choices"][0]["logprobs"]["top_logprobs"]:
                step.update(dict.fromkeys(step, float("nan")))
        return found

    result = compare(Toy(), "openai", reply)
    assert result.verdict is Verdict.DIFFERENT
    assert names(result) == {"not a number"}


def test_more_reused_positions_than_a_prompt_has_prove_nothing() -> None:
    def reply(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        found = answer(toy, kind, path, body)
        if path == "/v1/completions" and found["usage"]["prompt_tokens_details"]["cached_tokens"] > 8:
            found["usage"]["prompt_tokens_details"]["cached_tokens"] *= 1000
        return found

    assert compare(Toy(), "openai", reply).verdict is Verdict.NOT_COMPARABLE


def echoing(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
    """A server of OpenAI's API that gives log-probabilities of prompts, and computes all positions for them."""
    if path != "/v1/completions":
        return answer(toy, kind, path, body)
    found = answer(toy, kind, path, {**body, "cache_salt": None if body.get("echo") else "all"})
    if body.get("echo"):
        for listed in found["choices"][0]["logprobs"].values():
            listed[:0] = [None] * found["usage"]["prompt_tokens"]
    return found


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=() if fault in ("quantized", "stale edit") else pytest.mark.slow)
        for fault in sorted(FAULTS.keys() - ONLY_THOROUGH)
    ],
)
def test_faults_of_a_server_with_echo_are_found(fault: str) -> None:
    assert compare(Toy(fault), "openai", echoing).verdict is Verdict.DIFFERENT


def test_hits_of_other_lengths_are_not_called_not_deterministic() -> None:
    class Uneven(Toy):
        """Cached values are halved; hits reuse all or half of what is there in turn."""

        calls = 0

        def _generate(self, ids: list[int], steps: int, top: int, reused: int, space: str | None) -> Any:
            self.calls += 1
            return super()._generate(ids, steps, top, reused * (1 + self.calls % 2) // 2, space)

        def _rows(self, ids: list[int], reused: int, space: str | None) -> tuple[Any, Any, int]:
            keys, values, further = super()._rows(ids, reused, space)
            values[:reused] *= 0.5
            return keys, values, further

    result = compare(Uneven(keeps=True), "openai")
    assert result.verdict is Verdict.DIFFERENT
    assert "not deterministic" not in names(result)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_an_honest_server_with_echo_is_measured_like_others(noise: float) -> None:
    result = compare(Toy(noise=noise), "openai", echoing)
    assert result.verdict is Verdict.EQUIVALENT
    assert {"decoding", "edit in the middle", "rewind"} <= {probe.name for probe in result.probes}


def test_an_echo_from_the_cache_is_no_reference() -> None:
    def lazy(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        found = echoing(toy, kind, path, body)
        if body.get("echo"):
            found["usage"]["prompt_tokens_details"]["cached_tokens"] = 7
        return found

    result = compare(Toy(), "openai", lazy)
    assert "computes a text without its cache only once" in result.not_tested


@pytest.mark.parametrize("fault", ["", "stale edit", "chunk lost"])
def test_edits_are_tried_on_servers_that_keep_all_prompts(fault: str) -> None:
    result = compare(Toy(fault, keeps=True))
    assert result.verdict is (Verdict.DIFFERENT if fault else Verdict.EQUIVALENT)
    reused = {probe.name: probe.reused for probe in result.probes}
    assert (reused["edit near the end"], reused["edit in the middle"]) == (93, 48)


@pytest.mark.slow  # seconds
def test_borders_of_chunks_are_tried_on_servers_that_keep_all_prompts() -> None:
    result = compare(Toy("chunk lost", keeps=True), thorough=True)
    assert {"chunk borders", "past 128 positions"} <= {probe.name for probe in result.probes if probe.wrong}


def test_a_fault_past_a_window_is_found_by_thorough() -> None:
    assert compare(Toy("window")).verdict is Verdict.EQUIVALENT
    result = compare(Toy("window"), thorough=True)
    assert result.verdict is Verdict.DIFFERENT and names(result) == {"beginning lost"}
    assert "past 128 positions" in {probe.name for probe in result.probes if probe.wrong}


def test_a_fault_of_short_hits_is_found_by_thorough() -> None:
    assert compare(Toy("short hits")).verdict is Verdict.EQUIVALENT
    result = compare(Toy("short hits"), thorough=True)
    assert {probe.name for probe in result.probes if probe.wrong} == {"short prompts"}
    [finding] = result.findings
    assert finding.text == "Wrong where a text is continued at 33 positions or earlier, right from 48 on."


@pytest.mark.slow  # seconds of computing for each text
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_thorough_finds_all_faults(fault: str) -> None:
    result = compare(Toy(fault, slow=6 if fault in ("", "claimed hits") else 0), thorough=True, max_seconds=900)
    wanted = Verdict.NOT_COMPARABLE if fault == "claimed hits" else Verdict.DIFFERENT
    assert result.verdict is (wanted if fault else Verdict.EQUIVALENT), result.reason
    assert not FAULTS.get(fault) or FAULTS[fault] in names(result)


HONEST = [
    (seed, kind, noise, block)
    for seed in range(4)
    for kind, noise, block in (
        ("llama.cpp", 0.0, 1),
        ("vllm", 0.0, 16),
        ("sglang", 1e-4, 1),
        ("llama.cpp", 0.03, 1),
        ("vllm", 0.1, 32),
        ("openai", 0.01, 1),
    )
]


@pytest.mark.parametrize(
    ("seed", "kind", "noise", "block"),
    [pytest.param(*case, marks=() if case[0] == 0 else pytest.mark.slow) for case in HONEST],
)
def test_honest_servers_raise_no_alarm(seed: int, kind: str, noise: float, block: int) -> None:
    """Also those whose rounding depends on what is computed at the same time."""
    result = compare(Toy(noise=noise, seed=seed, block=block), kind)
    assert result.verdict is Verdict.EQUIVALENT, (result.reason, result.findings)
    assert result.acceptable and not result.findings
    assert any(probe.reused for probe in result.probes)


def test_noise_is_measured_and_hides_nothing_larger() -> None:
    result = compare(Toy("newest dropped", noise=0.02))
    assert result.verdict is Verdict.DIFFERENT
    assert all(0.005 < probe.noise < 0.1 for probe in result.probes if probe.name != "decoding")


def beginning_only(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
    """A server that reuses no more than the token that all prompts begin with."""
    found = answer(toy, kind, path, body)
    if "timings" in (found or {}):
        found["timings"]["cache_n"] = min(1, found["timings"]["cache_n"])
    return found


@pytest.mark.parametrize(("block", "reply"), [(10_000, answer), (1, beginning_only)])
def test_nothing_reused_is_not_comparable(block: int, reply: Any) -> None:
    result = compare(Toy(block=block), reply=reply)
    assert result.verdict is Verdict.NOT_COMPARABLE and "nothing was reused" in result.reason
    assert not result.acceptable


@pytest.mark.parametrize("kind", ["openai", "vllm"])
def test_a_server_without_counts_is_not_comparable(kind: str) -> None:
    def silent(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        found = answer(toy, kind, path, body)
        return {name: value for name, value in found.items() if name != "usage"} if found else found

    result = compare(Toy(), kind, silent)
    assert result.verdict is Verdict.NOT_COMPARABLE and "does not say" in result.reason
    assert compare(Toy("another state"), kind, silent).verdict is Verdict.DIFFERENT


def test_counts_may_come_from_metrics() -> None:
    hits = 0

    def counting(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        nonlocal hits
        if path == "/metrics":
            return 200, f'# HELP\nvllm:prefix_cache_hits_total{{engine="0"}} {float(hits)}\n'.encode()
        found = answer(toy, kind, path, body)
        if found and (usage := found.pop("usage", None)):
            hits += usage["prompt_tokens_details"]["cached_tokens"]
        return found

    result = compare(Toy(), "vllm", counting)
    assert result.verdict is Verdict.EQUIVALENT
    assert {probe.name: probe.reused for probe in result.probes}["same prompt"] == 95


def test_a_server_that_differs_from_itself_is_not_comparable() -> None:
    calls = 0

    def random(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        return answer(
            toy, kind, path, {**body, "prompt": [*body["prompt"], calls % 200]} if "n_probs" in body else body
        )

    result = compare(Toy(), reply=random)
    assert result.verdict is Verdict.NOT_COMPARABLE and names(result) == {"not deterministic"}


def test_limits_leave_probes_out_and_say_so() -> None:
    result = compare(Toy(), max_requests=30)
    assert "30 requests are used up; raise --max-requests" in result.not_tested
    assert "beside others" in result.not_tested and result.requests == 30


def test_a_server_may_take_log_probabilities_as_chats_do_and_in_any_order() -> None:
    """As mlx-lm does, whose `token` is not the generated one but the first of an unsorted list."""

    def chatty(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        if path != "/v1/completions":
            return answer(toy, kind, path, body)
        if body["logprobs"] is not True:
            return 422, b'{"error": "logprobs must be of type bool"}'
        found = answer(toy, kind, path, {**body, "logprobs": body["top_logprobs"]})
        steps = found["choices"][0]["logprobs"]["top_logprobs"]
        tops = [[{"token": name, "logprob": value} for name, value in step.items()][::-1] for step in steps]
        found["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top} for top in tops]}
        return found

    assert compare(Toy(), "openai", chatty).verdict is Verdict.EQUIVALENT
    assert compare(Toy("another state"), "openai", chatty).verdict is Verdict.DIFFERENT


def failing(status: int, data: bytes, after: int = 0) -> Callable[..., Any]:
    calls = 0

    def reply(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        nonlocal calls
        calls += 1
        return (status, data) if calls > after else answer(toy, kind, path, body)

    return reply


def at(path: str, data: bytes) -> Callable[..., Any]:
    """A server that answers with `data` at one path."""

    def reply(toy: Toy, kind: str, asked: str, body: dict[str, Any]) -> Any:
        return (200, data) if asked == path else answer(toy, kind, asked, body)

    return reply


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (failing(401, b"{}"), "wants another API key (401); see --api-key-env"),
        (failing(429, b"{}", after=5), "too many requests for the server (429)"),
        (failing(503, b"loading model", after=3), "the server failed (503: loading model)"),
        (failing(200, b"<html>hello</html>"), "the answer is no JSON: <html>hello</html>"),
        (failing(200, b"[" * 100_000), "the answer is no JSON"),
        (failing(200, b'{"a": 1}', after=4), "unexpected answer (KeyError"),
        (failing(404, b""), "the server there is not of a known kind"),
        (failing(400, b'{"error": "no"}', after=4), 'refused (400: {"error": "no"})'),
        (at("/tokenize", b'{"tokens": []}'), "unexpected answer (ValueError: no tokens)"),
    ],
)
def test_failures_are_one_line(reply: Any, message: str) -> None:
    with serving(Toy(), reply=reply) as url:
        result = run("compare", "--url", url)
    assert result.returncode == 1 and not result.stdout
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("status", "after"), [(429, "0"), (503, "Fri, 27 Nov 2020 07:00:00 GMT")])
def test_a_busy_server_is_asked_again_when_it_says(status: int, after: str) -> None:
    calls = count()

    def reply(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        busy = next(calls) % 7 == 6
        return (status, b"busy", ("Retry-After", after)) if busy else answer(toy, kind, path, body)

    assert compare(Toy(), reply=reply).verdict is Verdict.EQUIVALENT
    assert next(calls) > 14


def test_a_server_without_log_probabilities_is_not_comparable() -> None:
    def bare(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        return {"choices": [{"text": " x"}]} if path == "/v1/completions" else answer(toy, kind, path, body)

    with serving(Toy(), "openai", bare) as url:
        result = run("compare", "--url", url)
    assert result.returncode == 1 and not result.stderr
    assert result.stdout.startswith("openai: not comparable   the server gives no log-probabilities")
    assert len(result.stdout.splitlines()) == 2
    assert compare(Toy(), "openai", bare).requests <= 7


def test_controls_end_where_rounding_explains_a_distance() -> None:
    """Only the first text has a whole control where answers are equal: 4 requests of it, and none for 4 other texts."""
    exact, noisy = compare(Toy()), compare(Toy(noise=0.03))
    assert exact.requests <= 53
    assert exact.requests < noisy.requests <= 66


def test_a_slow_server_gets_short_texts_unless_it_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvgen.comparison.servers.comparison._SLOW", 0.0)
    result = compare(Toy(), seconds=45)
    assert (result.verdict, result.length, result.steps) == (Verdict.EQUIVALENT, 32, 4)
    assert "texts beyond 32 tokens (the server is slow; a larger --max-seconds" in result.not_tested
    assert (compare(Toy()).length, compare(Toy()).steps) == (96, 8)
    blocks = compare(Toy(block=32), "vllm", seconds=45)
    assert (blocks.verdict, blocks.length) == (Verdict.EQUIVALENT, 96)


def test_time_for_probes_leaves_the_last_out_but_not_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server that takes a second for each answer."""
    seconds = 0

    def ticking(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        nonlocal seconds
        seconds += 1
        return answer(toy, kind, path, body)

    monkeypatch.setattr("kvgen.comparison.servers.client.time", SimpleNamespace(monotonic=lambda: float(seconds)))
    result = compare(Toy(), reply=ticking, seconds=40)
    assert result.verdict is Verdict.EQUIVALENT
    left_out = "beside others, beside others, uncached (40 seconds are used up; raise --max-seconds)"
    assert result.not_tested.endswith(left_out)
    wrong = compare(Toy("newest dropped"), reply=ticking, seconds=40)
    assert names(wrong) == {"newest token missing"} and wrong.requests > 50
    none = compare(Toy(), reply=ticking, seconds=3)
    assert none.verdict is Verdict.NOT_COMPARABLE
    assert none.reason == "3 seconds are used up; raise --max-seconds"


def test_a_wrong_answer_counts_even_if_the_rest_of_its_probe_is_left_out() -> None:
    def cut(session: Session) -> Iterator[Trial]:
        yield session.hit(session.text, session.text)
        raise LimitError("no more requests")

    for fault in ("", "newest dropped"):
        with serving(Toy(fault)) as url, closing(Client(url)) as client:
            source = tuple(range(1, 99))
            session = Session(connect(client), 4, source, [source[::-1]], 64, counts=True)
            if fault:
                assert run_probe("cut", cut, session).wrong
            else:
                with pytest.raises(LimitError):
                    run_probe("cut", cut, session)


def test_tokens_without_alternatives_are_no_log_probabilities() -> None:
    bare = b'{"completion_probabilities": [{"id": 1, "logprob": -1, "top_logprobs": []}], "timings": {"cache_n": 0}}'
    assert "no log-probabilities" in compare(Toy(), reply=at("/completion", bare)).reason


def test_completions_without_tokens_are_not_equivalent() -> None:
    nothing = b'{"completion_probabilities": [], "timings": {"cache_n": 90}, "tokens_evaluated": 96}'
    with serving(Toy(), reply=at("/completion", nothing)) as url, closing(Client(url)) as client:
        session = Session(connect(client), 4, tuple(range(1, 99)), [], 64, counts=True)
        text = session.text
        kept = Answer((), (), 0, 64, 0.0)
        session.reference._answers[text] = kept
        probe = run_probe("same prompt", PROBES["same prompt"], session)
    assert (probe.verdict, probe.note) == (Verdict.NOT_COMPARABLE, "nothing was generated")


def test_counts_may_be_written_as_text() -> None:
    def spelled(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        found = answer(toy, kind, path, body)
        if usage := (found or {}).get("usage"):
            usage["prompt_tokens"] = str(usage["prompt_tokens"])
        return found

    assert compare(Toy(), "openai", spelled).verdict is Verdict.EQUIVALENT


def test_pages_at_unknown_paths_are_another_kind_of_server() -> None:
    assert compare(Toy(), "vllm", at("/props", b"<html>hello</html>")).server == "vllm"


@pytest.mark.parametrize(
    ("url", "shown", "asked"),
    [
        ("http://h/v1/completions", "http://h", "http://h/props"),
        ("http://h/v1?x=1", "http://h", "http://h/props"),
        ("http://h:80/proxy/v1/", "http://h/proxy", "http://h/proxy/props"),
        ("http://h/v10/", "http://h/v10", "http://h/v10/props"),
        ("http://me:secret@[::1]:9/v1", "http://[::1]:9", "http://me:secret@[::1]:9/props"),
    ],
)
def test_addresses_may_have_a_path_of_the_api_and_show_no_password(url: str, shown: str, asked: str) -> None:
    with closing(Client(url)) as client:
        assert client.url == shown
        assert str(client._http.build_request("GET", "/props").url) == asked


def test_a_redirection_names_the_new_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(9999)
                connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: https://h/login\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        result = run("compare", "--url", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert result.returncode == 1
    assert "moved to https://h/login (302); give --url the new address" in result.stderr


def test_an_answer_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr("kvgen.comparison.servers.client.time", SimpleNamespace(monotonic=lambda: 100.0 * next(clock)))
    with (
        serving(Toy(), reply=failing(200, b" " * 100_000)) as url,
        closing(Client(url)) as client,
        pytest.raises(KvgenError, match="no answer within 60 seconds; raise --timeout"),
    ):
        client.get("/props")


def test_a_server_that_lists_no_model_is_asked_without_a_name() -> None:
    def nameless(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        assert "model" not in body
        return {"data": []} if path == "/v1/models" else answer(toy, kind, path, body)

    assert compare(Toy(), "openai", nameless).verdict is Verdict.EQUIVALENT


def test_a_server_that_is_silent_or_ends_midway_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        silent = run("compare", "--url", url, "--timeout", "0.2")
        closer = threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True)
        listener.accept()[0].close()
        closer.start()
        broken = run("compare", "--url", url, "--timeout", "20")
    assert "no answer within 0.2 seconds; raise --timeout" in silent.stderr
    assert "the connection broke" in broken.stderr
    assert silent.returncode == broken.returncode == 1
    gone = run("compare", "--url", url)
    assert gone.returncode == 1 and "no server answers there" in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "localhost"), "http://"),
        (("--url", "localhost:8000"), "wanted an address such as http://localhost:8000"),
        (("--url", "http://"), "wanted an address such as http://localhost:8000"),
        (("--server-kind", "vllm"), "--server-kind needs --url"),
        (("--url", "http://localhost", "--dtype", "float32"), "options of models and patterns do not apply"),
        (("--url", "http://localhost", "--html", "page.html"), "--html does not apply to --url"),
        (("--url", "http://localhost", "--server-kind", "x"), "unknown; known: llama.cpp, vllm, sglang"),
        (("--url", "http://localhost", "--api-key-env", "NO_SUCH_KEY"), "the environment has no such variable"),
    ],
)
def test_wrong_usage_is_named(arguments: tuple[str, ...], message: str) -> None:
    result = run("compare", *arguments)
    assert result.returncode == 2 and message in result.stderr


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KEY", "secret-17")
    with serving(Toy()) as url:
        client = Client(url, key_variable="TOY_KEY")
        assert client._http.headers["authorization"] == "Bearer secret-17"
        client.close()


def test_the_command_prints_a_table_or_json() -> None:
    with serving(Toy()) as url:
        shown = run("compare", "--url", url)
        data = run("compare", "--url", f"{url}/v1", "--json", "--server-kind", "llama.cpp")
    assert shown.returncode == 0 and not shown.stderr
    assert shown.stdout.startswith("llama.cpp: equivalent\n")
    assert "edit in the middle" in shown.stdout and "Not tested: " in shown.stdout
    report = json.loads(data.stdout)
    assert report["acceptable"] and report["backend"] == "llama.cpp"
    [pattern] = report["comparisons"][0]["patterns"]
    assert {probe["verdict"] for probe in pattern["probes"]} == {"equivalent"}


def test_a_wrong_server_fails_with_its_cause(tmp_path: Path) -> None:
    with serving(Toy("stale edit")) as url:
        wrong = run("compare", "--url", url, "--junit", str(tmp_path / "report.xml"))
    assert wrong.returncode == 1 and wrong.stdout.startswith("llama.cpp: different\n")
    assert "an edit is not noticed" in wrong.stdout
    report = (tmp_path / "report.xml").read_text()
    assert 'name="cached: edit in the middle"' in report and "an edit is not noticed" in report


def test_interrupting_ends_at_once() -> None:
    asked, ended = threading.Event(), threading.Event()

    def hanging(toy: Toy, kind: str, path: str, body: dict[str, Any]) -> Any:
        if path == "/completion":
            asked.set()
            ended.wait(60)
        return answer(toy, kind, path, body)

    with serving(Toy(), reply=hanging) as url:
        code, shown = run_on_terminal("compare", "--url", url, interrupt_after="comparing")
        ended.set()
    assert code == 130 and "Traceback" not in shown


def of(*steps: dict[Any, float]) -> Answer:
    return Answer(steps, tuple(max(step, key=step.__getitem__) for step in steps), None, None, 0)


def test_distance_counts_tokens_that_one_side_names() -> None:
    assert step_distance({1: -1.0, 2: -2.0}, {1: -1.0, 2: -2.0}) == 0
    assert step_distance({1: -1.0, 2: -3.0}, {1: -1.0, 3: -3.0}) == 0  # 2 may have been just below
    assert step_distance({1: -1.0, 2: -2.0}, {1: -1.0, 3: -3.0}) == pytest.approx((1 / 3) ** 0.5)
    assert step_distance({1: float("nan")}, {1: -1.0}) == float("inf")
    assert distance(of(), of()) == 0 and distance(of(), of({1: -1.0})) == float("inf")
    ends, other = of({1: -1.0, 2: -2.0}, {5: -1.0}, {6: -1.0}), of({1: -1.0, 2: -2.0}, {4: -1.0}, {7: -9.0})
    assert distance(ends, other) == step_distance({5: -1.0}, {4: -1.0})  # later steps follow other texts


def test_printed_precision_is_that_of_decimals_or_of_sixteen_bits() -> None:
    assert printed_precision([{1: -1.2346, 2: -3.4, 3: -0.0001}]) == pytest.approx(1e-4)
    bf16 = {token: -2.0157 - token / 8 for token in range(10)}
    assert printed_precision([bf16]) == 1 / 8
    fine = {token: -2.0157 - token / 7.3 for token in range(10)}
    assert printed_precision([fine]) < 1e-4


def test_texts_are_as_long_as_asked_for_and_differ_from_the_first_word() -> None:
    texts = [compose(200, seed).split(" ") for seed in range(4)]
    assert {len(text) for text in texts} == {200}
    assert len({text[0] for text in texts}) == 4
    assert LIMIT > 1 and list(KINDS)[-1] == "openai"


@pytest.mark.slow  # a real model
def test_the_server_of_llama_cpp_is_equivalent(smollm2_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install xllamacpp")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.port = str(smollm2_path), port
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 4096, 2, 1
    server = xllamacpp.Server(parameters)
    client = Client(server.listening_address, timeout=300)
    result = compare_server(client, connect(client), "Once upon a time,")
    client.close()
    assert (result.server, result.verdict) == ("llama.cpp", Verdict.EQUIVALENT)
    assert {probe.name: probe.reused for probe in result.probes}["same prompt"] == 95


def test_the_shell_completes_every_kind() -> None:
    assert complete_kind("") == list(KINDS)
