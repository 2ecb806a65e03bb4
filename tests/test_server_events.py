"""How the events of requests come from the engine's thread to those that answer clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import kvgen
from kvgen.errors import ContextError, KvgenError
from kvgen.generation.step import Step
from kvgen.server.answers import Answer, TimeLimitError
from kvgen.server.events import Dispatcher, Events
from kvgen.server.schema import Job

ASKED = kvgen.Request([1, 2, 3])


class Computed:
    """An engine whose passes are made by hand."""

    def __init__(self) -> None:
        self.on_pass: Callable[[], None] = lambda: None
        self.emits: list[Callable[[kvgen.Chunk | KvgenError], None]] = []
        self.cancelled: list[int] = []

    def submit(self, request: kvgen.Request, emit: Callable[[kvgen.Chunk | KvgenError], None]) -> int:
        self.emits.append(emit)
        return len(self.emits) - 1

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def run_pass(self, *events: kvgen.Chunk | KvgenError | None) -> None:
        """Emit an event, or none, for each request so far."""
        for emit, event in zip(self.emits, events, strict=True):
            if event is not None:
                emit(event)
        self.on_pass()


def chunk(text: str, finish: Any = None) -> kvgen.Chunk:
    return kvgen.Chunk(text, Step(5, 3, 0, finish), finish)


def job(count: int = 1, **settings: Any) -> Job:
    return Job((ASKED,) * count, chat=False, **{"stream": True, **settings})


def in_a_loop(test: Callable[[Any, Dispatcher], Awaitable[None]]) -> None:
    async def main() -> None:
        engine: Any = Computed()
        await asyncio.wait_for(test(engine, Dispatcher(engine)), 60)

    asyncio.run(main())


def test_the_events_of_a_pass_come_to_the_event_loop_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Any, dispatcher: Dispatcher) -> None:
        loop, calls = asyncio.get_running_loop(), list[Any]()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: [calls.append(given), call(*given)])
        one, two = (Events(dispatcher, job(count), 0.0, None) for count in (1, 2))
        a, b, c = chunk("a"), chunk("b"), chunk("c")
        engine.run_pass(a, b, c)
        assert (await one.first(), await two.first()) == ([(0, a)], [(0, b), (1, c)])
        engine.run_pass(None, b, None)
        assert await anext(two) == [(0, b)]
        engine.run_pass(None, None, None)
        assert len(calls) == 2

    in_a_loop(test)


def test_chunks_that_come_before_an_error_go_first() -> None:
    async def test(engine: Any, dispatcher: Dispatcher) -> None:
        events = Events(dispatcher, job(), 0.0, None)
        engine.run_pass(chunk("a"))
        engine.run_pass(chunk("b"))
        engine.run_pass(ContextError("full"))
        assert await events.first() == [(0, chunk("a")), (0, chunk("b"))]
        with pytest.raises(ContextError, match="full"):
            await anext(events)
        await events.aclose()
        assert engine.cancelled == []

    in_a_loop(test)


def test_those_who_want_a_whole_answer_wake_up_when_a_request_ends() -> None:
    async def test(engine: Any, dispatcher: Dispatcher) -> None:
        events = Events(dispatcher, job(stream=False), 0.0, None)
        reading = asyncio.ensure_future(events.first())
        engine.run_pass(chunk("a"))
        for _ in range(9):
            await asyncio.sleep(0)
        assert not reading.done()
        engine.run_pass(chunk("b", "length"))
        assert await reading == [(0, chunk("a")), (0, chunk("b", "length"))]
        assert [one async for one in events] == []

    in_a_loop(test)


def test_a_request_that_takes_too_long_ends_and_is_cancelled() -> None:
    async def test(engine: Any, dispatcher: Dispatcher) -> None:
        events = Events(dispatcher, job(2), time.monotonic() - 5, 5.01)
        engine.run_pass(chunk("a", "length"), chunk("b"))
        assert len(await events.first()) == 2
        with pytest.raises(TimeLimitError, match=r"longer than 5\.01 s"):
            await anext(events)
        await events.aclose()
        assert engine.cancelled == [1]

    in_a_loop(test)


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_pieces_of_a_stream_are_objects_of_the_api(smollm2: kvgen.Loaded, chat: bool, include_usage: bool) -> None:
    asked = Job((ASKED,), chat, stream=True, include_usage=include_usage)
    answer = Answer(asked, 'a "model" \u00e9', smollm2.tokenizer)
    first, empty, end = (
        json.loads(answer.piece(0, one) or "null") for one in (chunk('"\u00e9\n'), chunk(""), chunk("z", "eos"))
    )
    assert empty is None
    kind = "chat.completion.chunk" if chat else "text_completion"
    common = {"object": kind, "model": 'a "model" \u00e9', **({"usage": None} if include_usage else {})}
    head = {name: first[name] for name in ("id", "created", "system_fingerprint")}
    bodies = (
        [{"delta": {"content": '"\u00e9\n', "role": "assistant"}}, {"delta": {"content": "z"}}]
        if chat
        else [{"text": '"\u00e9\n'}, {"text": "z"}]
    )
    for piece, body, reason in ((first, bodies[0], None), (end, bodies[1], "stop")):
        assert piece == {**head, **common, "choices": [{"index": 0, **body, "logprobs": None, "finish_reason": reason}]}
    assert json.loads(answer.last_piece()) == {**head, **common, "choices": [], "usage": answer.usage()}
