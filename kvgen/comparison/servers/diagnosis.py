"""Explain wrong answers without seeing inside: ask, uncached, for the text that a fault would have computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

from kvgen.comparison.servers.client import LimitError
from kvgen.comparison.servers.distance import distance
from kvgen.comparison.servers.probes import ServerProbe, Session, Trial
from kvgen.comparison.servers.server import Answer, Prompt
from kvgen.comparison.trial import Finding

_CLOSER = 3.0  # times closer to the answer predicted than to the right one
_SMALL = 0.1  # of what one missing token changes
_EXPLAINED = 3  # wrong probes
_CUTS = (16, 17, 24, 32, 33, 48, 49, 64, 65, 80, 96, 97, 128, 129, 131)
_VAGUE = {"small difference", "unexplained", "not diagnosed"}  # left out where another probe shows a cause
_SHORT = 40  # tokens of a prompt in which all hits are short
_SPACED = 4  # smallest chunk
_MULTIPLES = 3  # of a chunk that must be wrong, with right continuations on both sides
_AGAIN, _BESIDE = 6, 3  # times that a request is repeated alone, and beside others

_STALE = "Stale state: the answer is that of an earlier prompt; an edit is not noticed."
_FOREIGN = "Another request's state: the answer continues a different prompt."
_LEAK = "Another request's tokens: rows that are computed at the same time leak into each other."
_NEWEST = "The newest token is missing: the answer is that of the text without it."
_OLDEST = "The beginning is lost: the answer is that of the text without its first tokens."


def diagnose(session: Session, probes: Sequence[ServerProbe]) -> list[Finding]:
    """Findings for the wrong probes, at least one if there are any."""
    found: dict[str, Finding] = {}
    wrong = [probe for probe in probes if probe.wrong]
    alone = any(not probe.wrong and not (probe.worst and probe.worst.beside) for probe in probes)
    for probe in wrong[:_EXPLAINED]:
        try:
            finding = _explain(session, probe, alone=alone and "not deterministic" not in found)
        except LimitError as error:
            finding = Finding("not diagnosed", "The cause was not looked for.", str(error))
        found.setdefault(finding.name, finding)
    if found.keys() - _VAGUE:
        found = {name: finding for name, finding in found.items() if name not in _VAGUE}
    for probe in probes:
        if probe.unproven:
            text = "Claimed hits: the server counts reused positions, but takes as long as without its cache."
            found["claimed hits"] = Finding("claimed hits", text, probe.note)
    return list(found.values())


def _explain(session: Session, probe: ServerProbe, *, alone: bool) -> Finding:
    trial = probe.worst
    assert trial is not None
    beside = bool(trial.beside)
    if any(math.isnan(value) for step in trial.answer.steps for value in step.values()):
        return Finding(
            "not a number", "Log-probabilities are NaN where those without the cache are numbers.", probe.name
        )
    for name, text, prompt in _predictions(session, trial):
        if not session.server.repeats and not session.reference.knows(prompt):
            continue
        apart = distance(session.reference.answer(prompt), trial.answer)
        if apart * _CLOSER < probe.distance and apart <= session.reference.explaining(prompt, apart).limit:
            return Finding(
                name, text, f"{probe.name}: {apart:.2g} nats from it, {probe.distance:.2g} from the right one"
            )
    wrong, finding = _repeated(session, probe)
    if finding:
        return finding
    if beside and alone and wrong is False and not _wrong_after_others(session, trial):
        return _beside_again(session, probe)
    if finding := _lengths(session, probe):
        return finding
    control = session.reference.of(trial.prompt)
    if not session.server.repeats:
        text = "The cause cannot be looked for: the server computes a text without its cache only once."
        return Finding("unexplained", text, f"{probe.name}: {probe.distance:.2g} nats")
    one = distance(control.answer, session.reference.answer(trial.prompt[:-1]))
    evidence = f"{probe.name}: {probe.distance:.2g} nats, {probe.distance / probe.noise:.2g} times the noise; "
    evidence += f"a missing token changes {one:.2g}"
    if probe.distance < _SMALL * one:
        text = "The difference is small: of lower precision, or of a small error in what is stored, found or computed."
        return Finding("small difference", text, evidence)
    return Finding("unexplained", "None of the known explanations fits.", evidence)


def _predictions(session: Session, trial: Trial) -> Iterator[tuple[str, str, Prompt]]:
    """Names and sentences of faults, with the text that each would have computed."""
    prompt, reused = trial.prompt, trial.answer.reused or 0
    foreign = "another request's tokens", _LEAK
    for other in dict.fromkeys((*trial.earlier, *trial.beside, *session.others)):
        if other == prompt:
            continue
        shared = next((at for at, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), len(prompt))
        mixed = other[: len(prompt) - 1] + prompt[len(other[: len(prompt) - 1]) :]
        name = foreign if other in trial.beside else ("another request's state", _FOREIGN)
        if shared > len(prompt) // 4:
            name = "stale state", _STALE
        for predicted in dict.fromkeys((other, mixed, other[:reused] + prompt[reused:])):
            if predicted != prompt and not _only_shorter(predicted, prompt):
                yield *name, predicted
    for place in dict.fromkeys((len(prompt) - 1, len(prompt) - 2, reused - 1)):
        if 0 <= place < len(prompt):
            yield "newest token missing", _NEWEST, prompt[:place] + prompt[place + 1 :]
    yield "beginning lost", _OLDEST, prompt[1:]
    yield "beginning lost", _OLDEST, prompt[:1] + prompt[2:]
    if session.server.repeats:
        yield "beginning lost", _OLDEST, prompt[-_window(session, trial) :]


def _window(session: Session, trial: Trial) -> int:
    """The number of last tokens whose uncached answer is closest to that of a trial, by ternary search."""
    low, high = 1, len(trial.prompt) - 1
    while high - low > 2:
        third = (high - low) // 3
        near, far = (
            distance(session.reference.answer(trial.prompt[-kept:]), trial.answer)
            for kept in (low + third, high - third)
        )
        low, high = (low, high - third) if near < far else (low + third, high)
    kept = range(low, high + 1)
    return min(kept, key=lambda last: distance(session.reference.answer(trial.prompt[-last:]), trial.answer))


def _only_shorter(predicted: Prompt, prompt: Prompt) -> bool:
    return predicted == prompt[: len(predicted)]


def _repeated(session: Session, probe: ServerProbe) -> tuple[bool | None, Finding | None]:
    """Repeat the request alone: whether it is ever wrong then, None if that cannot be said; and a finding if its
    answers differ from each other."""
    trial = probe.worst
    assert trial is not None
    if not (trial.reads_cache or session.server.repeats):
        return None, None
    earlier = (trial.prompt,) if trial.beside else trial.earlier
    answers = [
        session.hit(trial.prompt, *earlier).answer
        if trial.reads_cache
        else session.server.ask(trial.prompt, session.reference.steps, None)
        for _ in range(_AGAIN)
    ]
    if trial.reads_cache and session.counts:
        answers = [answer for answer in answers if answer.hit]
    if not answers:
        return None, None
    apart = [distance(session.reference.answer(trial.prompt), answer) for answer in answers]
    limit = session.reference.explaining(trial.prompt, max(apart)).limit
    wrong, between = sum(one > limit for one in apart), max(map(partial(_from_like, answers), answers))
    if not wrong or between <= limit:
        return bool(wrong), None
    evidence = f"{probe.name}: alone, {len(apart)} times, wrong in {wrong}; up to {between:.2g} nats from the first"
    kind = "hits" if trial.reads_cache else "answers"
    return True, Finding("not deterministic", f"Not deterministic: equal {kind} differ from each other.", evidence)


def _wrong_after_others(session: Session, trial: Trial) -> bool:
    """Whether the prompt is wrong after those beside it as well, one at a time."""
    if not trial.reads_cache:
        return False
    return _is_wrong(session, session.hit(trial.prompt, trial.prompt, *trial.beside))


def _beside_again(session: Session, probe: ServerProbe) -> Finding:
    """Repeat a request that is right alone beside the same others: whether it is wrong because of them."""
    trial, wrong = probe.worst, 0
    assert trial is not None
    prompts = (trial.prompt, *trial.beside)
    for _ in range(_BESIDE):
        space = session.space() if trial.reads_cache else None
        if trial.reads_cache and session.server.repeats:
            for prompt in prompts:
                session.server.ask(prompt, 1, space)
        wrong += _is_wrong(session, session.at_once(prompts, space)[0])
    evidence = (
        f"{probe.name}: {probe.distance:.2g} nats off, wrong again in {wrong} of {_BESIDE}; alone, right in {_AGAIN}"
    )
    if 2 * wrong > _BESIDE:
        return Finding("another request's tokens", _LEAK, evidence)
    return Finding("not deterministic", "Not deterministic: equal requests beside equal others differ.", evidence)


def _is_wrong(session: Session, trial: Trial) -> bool:
    apart = distance(session.reference.answer(trial.prompt), trial.answer)
    return apart > session.reference.explaining(trial.prompt, apart).limit


def _from_like(answers: Sequence[Answer], answer: Answer) -> float:
    """Distance of an answer from the first that reused as many positions."""
    return distance(next(one for one in answers if one.reused == answer.reused), answer)


def _lengths(session: Session, probe: ServerProbe) -> Finding | None:
    """Whether a text is wrong only if it is continued at some length or later, or earlier, or at multiples of some
    number."""
    trial = probe.worst
    assert trial is not None
    if not session.server.repeats or not trial.earlier or trial.beside:
        return None
    wrong, right = _continued(session, trial.prompt, _CUTS)
    if not wrong or not right:
        return _short_hits(session) if not right and len(trial.prompt) <= _SHORT else None
    if len(wrong) > 1 and len(right) > 1 and wrong[0] > right[-1]:
        text = f"Wrong where a text is continued at {wrong[0]} positions or later, right up to {right[-1]}."
        return Finding("beyond a length", text, _wrong_and_right(wrong, right))
    size = math.gcd(*wrong)
    multiples = [size * number for number in range(1, _MULTIPLES + 1)]
    if size < _SPACED or any(cut % size == 0 for cut in right) or multiples[-1] + _SPACED > len(session.source):
        return None
    wrong, right = _continued_near_the_end(session, [[cut - 1, cut, cut + 1] for cut in multiples])
    if wrong != multiples or len(right) != 2 * len(multiples):
        return None
    text = f"Chunk boundary: wrong where a text is continued at multiples of {size}."
    return Finding("chunk boundary", text, _wrong_and_right(wrong, right))


def _short_hits(session: Session) -> Finding | None:
    """Whether texts are wrong only if they are continued at some length or earlier."""
    longest = len(session.source) - _SPACED
    wrong, right = _continued_near_the_end(session, [[cut] for cut in _CUTS if cut <= longest])
    if min(len(wrong), len(right)) < 2 or wrong[-1] > right[0]:
        return None
    text = f"Wrong where a text is continued at {wrong[-1]} positions or earlier, right from {right[0]} on."
    return Finding("below a length", text, _wrong_and_right(wrong, right))


def _continued_near_the_end(session: Session, groups: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """As `_continued`, for lengths in groups, each in a text that ends shortly after it, where a fault shows."""
    parts = [_continued(session, session.source[: max(cuts) + _SPACED - 1], cuts) for cuts in groups]
    wrong, right = ([*chain(*cuts)] for cuts in zip(*parts, strict=True))
    return wrong, right


def _continued(session: Session, prompt: Prompt, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
    """The lengths, of those given, where a prompt is wrong and right if what is before is in the cache."""
    wrong: list[int] = []
    right: list[int] = []
    for cut in (cut for cut in cuts if cut < len(prompt)):
        answer = session.hit(prompt, prompt[:cut]).answer
        if answer.hit or not session.counts:
            apart = distance(session.reference.answer(prompt), answer)
            (wrong if apart > session.reference.explaining(prompt, apart).limit else right).append(cut)
    return wrong, right


def _wrong_and_right(wrong: Sequence[int], right: Sequence[int]) -> str:
    return f"wrong at {', '.join(map(str, wrong))}; right at {', '.join(map(str, right))}"
