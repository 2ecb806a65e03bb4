"""Uses of a server's cache, each judged against uncached answers of the same texts."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvgen.comparison.servers.client import LimitError
from kvgen.comparison.servers.distance import distance
from kvgen.comparison.servers.reference import LARGEST_NOISE, Reference
from kvgen.comparison.servers.server import Answer, Prompt, Server, pieces
from kvgen.comparison.servers.texts import compose
from kvgen.comparison.verdict import Verdict

_ROUNDS = 2  # of requests at the same time
_UNUSED = 5  # words that no earlier prompt begins with: one beginning of a hundred million
_CHUNK = 64  # positions; what servers compute or keep at once is often a multiple, or a part


@dataclass(frozen=True)
class Trial:
    """An answer that may have come from the cache.

    earlier: prompts that were sent before in the same space. beside: prompts in progress at the same time.
    reads_cache: whether the request may read the cache.
    """

    prompt: Prompt
    answer: Answer
    earlier: tuple[Prompt, ...] = ()
    beside: tuple[Prompt, ...] = ()
    reads_cache: bool = True


@dataclass(frozen=True)
class ServerProbe:
    """One use of the cache.

    length: tokens of the worst prompt. reused: positions that its answer took from the cache, if the server says.
    distance, noise: nats. near_tie: whether a token differs, where the likeliest two are closer than the noise.
    note: what else to know. unproven: whether times contradict the counts of reused positions.
    worst: the trial that is furthest from its reference.
    """

    name: str
    verdict: Verdict
    length: int = 0
    reused: int | None = None
    distance: float = 0.0
    noise: float = 0.0
    near_tie: bool = False
    note: str = ""
    unproven: bool = False
    worst: Trial | None = None

    @property
    def wrong(self) -> bool:
        return self.verdict is Verdict.DIFFERENT


def unused(server: Server, prompt: Prompt) -> Prompt:
    """The prompt, with an unused beginning if the server computes each text only once without its cache."""
    if server.repeats:
        return prompt
    beginning = compose(_UNUSED, uuid.uuid4().int)
    return (*pieces(beginning), f" {prompt[0]}", *prompt[1:])


class Session:
    """A text and others of its length to try a server on, and the means to.

    counts: whether the server says how many positions it reused. source: a text longer than all that are tried.
    """

    def __init__(
        self, server: Server, steps: int, source: Prompt, others: Sequence[Prompt], length: int, counts: bool
    ) -> None:
        self.server, self.reference, self.counts = server, Reference(server, steps), counts
        self.source, self.text = source, unused(server, source[:length])
        self.others = [unused(server, other[:length]) for other in others]

    def space(self) -> str:
        return uuid.uuid4().hex

    def hit(self, prompt: Prompt, *earlier: Prompt) -> Trial:
        """Ask for a prompt after earlier ones in a new space."""
        space = self.space()
        if not self.server.repeats:
            self.reference.answer(prompt)  # leaves it in the cache
        for other in earlier:
            if self.server.repeats or self.reference.knows(other):
                self.server.ask(other, 1, space)
            else:
                self.reference.answer(other)
        return Trial(prompt, self.server.ask(prompt, self.reference.steps, space), earlier)

    def hit_in_part(self, prompt: Prompt, shared: int, earlier: Prompt) -> Trial:
        """Ask for a prompt after one that begins with `shared` tokens of it.

        A server that still has all of the prompt, from before, is asked for another end of that beginning.
        """
        trial, other = self.hit(prompt, earlier), prompt[:shared] + prompt[shared:][::-1]
        return self.hit(other, earlier) if trial.answer.whole and other != prompt else trial

    def at_once(self, prompts: Sequence[Prompt], space: str | None) -> list[Trial]:
        """Ask for all prompts at the same time."""
        steps = self.reference.steps
        pool = ThreadPoolExecutor(len(prompts))
        try:
            answers = list(pool.map(lambda prompt: self.server.ask(prompt, steps, space), prompts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for the server
        return [
            Trial(prompt, answer, tuple(prompts), tuple(set(prompts) - {prompt}), space is not None)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


ProbeTrials = Callable[[Session], Iterator[Trial]]


def same_prompt(session: Session) -> Iterator[Trial]:
    yield session.hit(session.text, *_cached(session))


def continued_prompt(session: Session) -> Iterator[Trial]:
    text, half = session.text, len(session.text) // 2
    for cut in (half * 3 // 2 // _CHUNK * _CHUNK or half, half + 3):
        yield session.hit_in_part(text, cut, text[:cut])


def continued_conversation(session: Session) -> Iterator[Trial]:
    space, text = session.space(), session.text[: len(session.text) // 2]
    answer = session.server.ask(text, session.reference.steps, space)
    longer = text + answer.tokens + session.others[0][:9]
    yield Trial(longer, session.server.ask(longer, session.reference.steps, space), (text + answer.tokens,))


def edit_near_the_end(session: Session) -> Iterator[Trial]:
    text = session.text
    other = next(token for token in session.others[0][::-1] if token != text[-3])
    yield session.hit_in_part(text, len(text) - 3, (*text[:-3], other, *text[-2:]))


def edit_in_the_middle(session: Session) -> Iterator[Trial]:
    yield session.hit_in_part(session.text, len(session.text) // 2, edited(session))


def edited(session: Session) -> Prompt:
    """The text with two other tokens in the middle."""
    text, half = session.text, len(session.text) // 2
    return text[:half] + session.others[0][half : half + 2] + text[half + 2 :]


def rewind(session: Session) -> Iterator[Trial]:
    yield session.hit(session.text[:-5], session.text)


def after_other_prompts(session: Session) -> Iterator[Trial]:
    yield session.hit(session.text, *_cached(session), *session.others)


def _cached(session: Session) -> list[Prompt]:
    """What to ask for to have the text in the cache, where its reference is not."""
    return [session.text] if session.server.repeats else []


def beside_others(session: Session) -> Iterator[Trial]:
    """The same prompts at the same time, all of them in the cache."""
    prompts, space = [session.text, *session.others], session.space()
    for prompt in prompts:
        if session.server.repeats:
            session.server.ask(prompt, 1, space)
        session.reference.answer(prompt)
    for turn in range(_ROUNDS):
        yield from session.at_once(prompts[turn:] + prompts[:turn], space)


def beside_others_uncached(session: Session) -> Iterator[Trial]:
    """The same prompts at the same time, without the cache."""
    yield from session.at_once([session.text, *session.others], None)


PROBES: dict[str, ProbeTrials] = {
    "same prompt": same_prompt,
    "continued prompt": continued_prompt,
    "continued conversation": continued_conversation,
    "edit near the end": edit_near_the_end,
    "edit in the middle": edit_in_the_middle,
    "rewind": rewind,
    "after other prompts": after_other_prompts,
    "beside others": beside_others,
    "beside others, uncached": beside_others_uncached,
}

ONCE = ("same prompt", "after other prompts", "beside others")
"""Probes that need no uncached answer but the first."""


def decoding(session: Session) -> ServerProbe:
    """Steps of decoding, which read the cache of their own request, against uncached requests for the same texts."""
    control = session.reference.of(session.text)
    if control.decoded is None:
        return ServerProbe("decoding", Verdict.NOT_COMPARABLE, note="its steps cannot be asked for as prompts")
    wrong = control.decoded > LARGEST_NOISE
    noise = max(control.repeated, control.printed)
    worst = Trial(session.text, control.answer, reads_cache=False)
    verdict = Verdict.DIFFERENT if wrong else Verdict.EQUIVALENT
    return ServerProbe("decoding", verdict, len(session.text), None, control.decoded, noise, worst=worst)


def run_probe(name: str, trials: ProbeTrials, session: Session) -> ServerProbe:
    """Make the trials of a probe, and judge the worst of them."""
    judged: list[ServerProbe] = []
    try:
        for trial in trials(session):
            judged.append(_judge(session, trial))
    except LimitError:
        if not any(probe.wrong for probe in judged):
            raise
    compared = [probe for probe in judged if probe.verdict is not Verdict.NOT_COMPARABLE]
    worst = max(compared or judged[:1], key=lambda probe: (probe.wrong, probe.distance / probe.noise))
    return ServerProbe(**{**vars(worst), "name": name})


def _judge(session: Session, trial: Trial) -> ServerProbe:
    apart = distance(session.reference.answer(trial.prompt), trial.answer)
    control = session.reference.explaining(trial.prompt, apart)
    wrong = apart > control.limit
    verdict, note = (Verdict.DIFFERENT if wrong else Verdict.EQUIVALENT), ""
    if not wrong and not control.answer.steps:
        verdict, note = Verdict.NOT_COMPARABLE, "nothing was generated"
    elif not wrong and trial.reads_cache and not trial.answer.hit and not (trial.beside and session.counts):
        verdict = Verdict.NOT_COMPARABLE
        note = "nothing was reused" if session.counts else "equal, but the server does not say whether it reused"
    near_tie = not wrong and _tokens_differ(control.answer, trial.answer)
    return ServerProbe(
        "", verdict, len(trial.prompt), trial.answer.reused, apart, control.noise, near_tie, note, worst=trial
    )


def _tokens_differ(a: Answer, b: Answer) -> bool:
    return any(one != other for one, other in zip(a.tokens, b.tokens, strict=False))
