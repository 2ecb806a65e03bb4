"""Probes for `--thorough`: short and long texts, borders of chunks, many requests in many orders, time of hits."""

from __future__ import annotations

import random
from collections.abc import Iterator

from kvgen.comparison.servers.probes import ProbeTrials, ServerProbe, Session, Trial, edited
from kvgen.comparison.verdict import Verdict

_SHORT = (8, 12, 20, 32, 40)
_BORDERS = (16, 32, 64, 128, 256, 512)
_ORDERS = 4
_MANY = 12
_TRIES = 3
_SLOW = 0.7  # of the time of an uncached request; a hit takes a small part of it
_MEASURABLE = 0.05  # seconds
LONG = (128, 512, 2048)
"""Positions that long texts go past."""


def past(length: int) -> ProbeTrials:
    """Texts longer than `length`: again, and continued from half and from just before its end."""

    def trials(session: Session) -> Iterator[Trial]:
        text = session.source[: length + 37]
        for cut in (len(text), len(text) // 2, length):
            yield session.hit_in_part(text, cut, text[:cut])

    return trials


def chunk_borders(session: Session) -> Iterator[Trial]:
    """One text, continued from one position before, at, and one after each border."""
    text = session.source[: min(len(session.source), _BORDERS[-1] + 40)]
    for border in _BORDERS:
        for cut in (border - 1, border, border + 1):
            if cut < len(text) and cut + len(text) // 8 >= min(_BORDERS[0], len(text)):
                yield session.hit_in_part(text, cut, text[:cut])


def short_prompts(session: Session) -> Iterator[Trial]:
    """Prompts of a few tokens: again, and continued from half; in a long text, a few cached positions hardly show."""
    for length in _SHORT:
        text = session.source[:length]
        for cut in (length, length // 2 + 1):
            yield session.hit_in_part(text, cut, text[:cut])


def rewinds(session: Session) -> Iterator[Trial]:
    for back in (1, 2, 8):
        yield session.hit(session.text[:-back], session.text)


def edited_again(session: Session) -> Iterator[Trial]:
    """A prompt that differs in the middle from one that is cached, asked for twice."""
    prompt = edited(session)
    yield session.hit(prompt, session.text, prompt)


def many_orders(session: Session) -> Iterator[Trial]:
    """Several prompts at once, some of them in the cache, in several orders."""
    source = random.Random(0)
    prompts = [session.text, *session.others]
    for _ in range(_ORDERS):
        space, order = session.space(), source.sample(prompts, len(prompts))
        for prompt in order[: source.randrange(1, len(order))]:
            session.server.ask(prompt, 1, space)
        yield from session.at_once(order, space)


def after_many(session: Session) -> Iterator[Trial]:
    """A hit after many prompts that begin differently."""
    length = len(session.text)
    start = len(session.source) - length - _MANY
    many = [session.source[max(1, start) + number :][:length] for number in range(_MANY)]
    yield session.hit(session.text, session.text, *many)


PROBES: dict[str, ProbeTrials] = {
    "short prompts": short_prompts,
    "chunk borders": chunk_borders,
    "rewinds": rewinds,
    "edited prompt again": edited_again,
    "many orders at once": many_orders,
    "after many prompts": after_many,
}


def claimed_hits(session: Session) -> ServerProbe:
    """Whether hits take less time than uncached requests: counts of reused positions may be wrong."""
    text, name = session.source, "time of hits"
    space = session.space()
    claimed = [session.server.ask(text, 1, space).reused for _ in range(2)][-1]
    kinds = (text[:2], None), (text, None), (text, space)
    rounds = [[session.server.ask(prompt, 1, where).seconds for prompt, where in kinds] for _ in range(_TRIES)]
    short, uncached, cached = (min(times) for times in zip(*rounds, strict=True))  # in turn: a busy machine slows all
    note = (
        f"{1000 * cached:.0f} ms with the cache, {1000 * uncached:.0f} ms without, {1000 * short:.0f} ms for 2 tokens"
    )
    if uncached - short < _MEASURABLE:
        return ServerProbe(name, Verdict.NOT_COMPARABLE, len(text), claimed, note=f"too quick to tell: {note}")
    unproven = bool(claimed) and cached - short >= _SLOW * (uncached - short)
    verdict = Verdict.NOT_COMPARABLE if unproven else Verdict.EQUIVALENT
    return ServerProbe(name, verdict, len(text), claimed, note=note, unproven=unproven)
