"""Compare the cached answers of a running server with its uncached ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvgen.comparison.servers.client import Client, LimitError
from kvgen.comparison.servers.diagnosis import diagnose
from kvgen.comparison.servers.probes import ONCE, PROBES, ServerProbe, Session, decoding, run_probe, unused
from kvgen.comparison.servers.reference import LARGEST_NOISE
from kvgen.comparison.servers.server import NoLogprobsError, Prompt, Server
from kvgen.comparison.servers.texts import compose
from kvgen.comparison.servers.thorough import LONG, claimed_hits, past
from kvgen.comparison.servers.thorough import PROBES as THOROUGH
from kvgen.comparison.trial import Finding
from kvgen.comparison.verdict import ACCEPTABLE, Verdict
from kvgen.errors import KvgenError

_LENGTHS = (96, 160, 320, 640, 1280)  # the first whose beginning is reused; some servers reuse blocks of 128
_SLOW_LENGTH, _SLOW_STEPS = 32, 4  # for a server that takes longer for them than
_SLOW = 1.2  # seconds
_WARM = 4  # tokens
_OTHERS = 3
_LONGEST = max(LONG) + 64

Progress = Callable[[int, int], None]
"""Called with the numbers of probes that are done, and of all."""


@dataclass(frozen=True)
class ServerComparison:
    """Result for one server.

    prompt: how the texts begin. length: tokens of most prompts, or words for a server that takes text only.
    reason: why the verdict is what it is, if no probe says. not_tested: what was not tested, in words.
    requests, seconds: that the comparison took.
    """

    server: str
    url: str
    model: str
    verdict: Verdict
    reason: str = ""
    prompt: str = ""
    length: int = 0
    steps: int = 0
    probes: tuple[ServerProbe, ...] = ()
    findings: tuple[Finding, ...] = ()
    not_tested: str = ""
    requests: int = 0
    seconds: float = 0.0

    @property
    def acceptable(self) -> bool:
        return self.verdict in ACCEPTABLE


def compare_server(
    client: Client,
    server: Server,
    prompt: str = "",
    *,
    steps: int = 8,
    thorough: bool = False,
    seconds: float = math.inf,
    progress: Progress = lambda done, total: None,
) -> ServerComparison:
    """Compare what a server answers from its cache with what it answers without.

    prompt: the beginning of the text to complete; more is added. steps: tokens to generate for each request.
    thorough: also long texts, borders of chunks, many orders, and times. seconds: time for the probes, which leaves out
        what does not fit; looking for a cause may take until the client's own limit. A slow server gets shorter texts.

    Raises KvgenError if the server cannot be asked.
    """
    began = time.perf_counter()
    result = ServerComparison(server.kind, client.url, server.model, Verdict.NOT_COMPARABLE, prompt=prompt, steps=steps)
    try:
        result = _compare(client, server, result, thorough=thorough, seconds=seconds, progress=progress)
    except (NoLogprobsError, LimitError) as error:
        result = replace(result, reason=str(error))
    return replace(result, requests=client.requests, seconds=time.perf_counter() - began)


def _compare(
    client: Client, server: Server, result: ServerComparison, *, thorough: bool, seconds: float, progress: Progress
) -> ServerComparison:
    probes, findings, untried = list[ServerProbe](), list[Finding](), list[str]()
    with client.within(seconds):
        longest = _longest(server, result.steps, thorough=thorough)
        session = _session(server, result.steps, result.prompt, longest, hurried=math.isfinite(seconds))
        control = session.reference.of(session.text)
        if control.repeated > LARGEST_NOISE:
            text = "The server is not deterministic: equal uncached requests at temperature 0 give different results."
            findings = [Finding("not deterministic", text, f"they differ by {control.repeated:.2g} nats")]
        else:
            probes, untried = _run_all(list(_runs(session, thorough=thorough)), progress)
    findings = findings or diagnose(session, probes)
    verdict, reason = _verdict(session, probes, findings, untried)
    return replace(
        result,
        verdict=verdict,
        reason=reason,
        length=len(session.text),
        steps=session.reference.steps,
        probes=tuple(probes),
        findings=tuple(findings),
        not_tested=_not_tested(session, untried, thorough=thorough),
    )


def _run_all(
    runs: Sequence[tuple[str, Callable[[], ServerProbe]]], progress: Progress
) -> tuple[list[ServerProbe], list[str]]:
    """Run probes until a limit is reached. Returns their results, and what was not tried and why, in words."""
    probes: list[ServerProbe] = []
    for done, (_, run) in enumerate(runs):
        progress(done, len(runs))
        try:
            probes.append(run())
        except LimitError as error:
            return probes, [f"{', '.join(left for left, _ in runs[done:])} ({error})"]
    progress(len(runs), len(runs))
    return probes, []


def _longest(server: Server, steps: int, *, thorough: bool) -> int:
    """Length of the longest text to try, in tokens."""
    longest = _LONGEST if thorough else max(_LENGTHS)
    room = longest if server.context is None else server.context - 3 * steps - 16
    if room < _LENGTHS[0]:
        raise KvgenError(f"the server's context of {server.context} positions is too short to compare with")
    return min(longest, room)


def _session(server: Server, steps: int, prompt: str, longest: int, *, hurried: bool) -> Session:
    """A text, and others, that are long enough for the server to reuse half of it.

    hurried: whether a slow server gets shorter ones, and fewer steps.
    """
    beginning = f"{prompt.strip()} " if prompt.strip() else ""
    source = server.encode(beginning + compose(longest, 0))[:longest]
    others = [server.encode(compose(longest, seed))[:longest] for seed in range(1, _OTHERS + 1)]
    slow = hurried and _is_slow(server, source, steps)
    steps = min(steps, _SLOW_STEPS) if slow else steps
    counts, length = False, min(_LENGTHS[2], longest)
    for tried in (tried for tried in (*([_SLOW_LENGTH] if slow else []), *_LENGTHS) if tried <= longest):
        session = Session(server, steps, source, others, tried, True)
        space = session.space()
        server.ask(session.text[: tried // 2], 1, space)
        answer = server.ask(session.text, 1, space)
        counts = counts or answer.reused is not None
        if answer.hit or not counts:
            length = tried if answer.hit else length
            break
    return Session(server, steps, source, others, length, counts)


def _is_slow(server: Server, source: Prompt, steps: int) -> bool:
    """Whether a server takes so long for a short text that usual ones would take minutes."""
    text = source[-_SLOW_LENGTH:]
    server.ask(unused(server, text[:_WARM]), 1, None)  # the first request may load or compile
    return server.ask(unused(server, text), min(steps, _SLOW_STEPS), None).seconds > _SLOW


def _runs(session: Session, *, thorough: bool) -> Iterator[tuple[str, Callable[[], ServerProbe]]]:
    def probe(name: str, trials: Any) -> tuple[str, Callable[[], ServerProbe]]:
        return name, lambda: run_probe(name, trials, session)

    once = not session.server.repeats
    if not once:
        yield "decoding", lambda: decoding(session)
    for name, trials in PROBES.items():
        if name in ONCE or not once:
            yield probe(name, trials)
    if not thorough or once:
        return
    for name, trials in THOROUGH.items():
        yield probe(name, trials)
    for length in LONG:
        if length + 37 <= len(session.source):
            yield probe(f"past {length:,} positions", past(length))
    yield "time of hits", lambda: claimed_hits(session)


def _verdict(
    session: Session, probes: list[ServerProbe], findings: list[Finding], untried: list[str]
) -> tuple[Verdict, str]:
    if any(probe.wrong for probe in probes):
        return Verdict.DIFFERENT, ""
    names = {finding.name for finding in findings}
    if "not deterministic" in names:
        return Verdict.NOT_COMPARABLE, "the server differs from itself"
    if "claimed hits" in names:
        return Verdict.NOT_COMPARABLE, "the server claims hits, but takes as long as without its cache"
    if not session.counts:
        return Verdict.NOT_COMPARABLE, "all answers are equal, but the server does not say whether it reused anything"
    if not any(probe.verdict is Verdict.EQUIVALENT and probe.worst and probe.worst.answer.hit for probe in probes):
        if untried:
            return Verdict.NOT_COMPARABLE, f"no probe that is done reused anything; left out: {'; '.join(untried)}"
        return Verdict.NOT_COMPARABLE, "nothing was reused: the server's cache is off, or needs longer texts"
    return Verdict.EQUIVALENT, ""


def _not_tested(session: Session, untried: list[str], *, thorough: bool) -> str:
    longest = len(session.source) if thorough else len(session.text)
    slow = " (the server is slow; a larger --max-seconds tries longer ones)" if longest < _LENGTHS[0] else ""
    parts = [f"texts beyond {longest:,} tokens{slow}", "chats and other templates", "images"]
    if not session.server.repeats:
        parts.append("edits, rewinds and noise: the server computes a text without its cache only once")
    return "; ".join(parts + untried)
