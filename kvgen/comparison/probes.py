"""Run other uses of a cache and compare each with uncached logits of exactly the text that it used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from kvgen.comparison.case import CALL_ERRORS, Case
from kvgen.comparison.rounding import BEYOND_DOUBT, is_rounding
from kvgen.comparison.uses import Check, Use, steps_of
from kvgen.errors import CacheError, UnsupportedError, in_one_line

Progress = Callable[[str, int, int], None]
"""Called before each use with its name, its number from 0 and the number of uses."""

_DIFFERS_TOO = ("differs too", "This use differs too: the pattern itself is wrong, so it tells no cause of its own.")
_UNREPEATED = (
    "not deterministic",
    "Equal calls give different results: they depend on more than the text, such as the number of calls before.",
)
_SOME_TOKENS = (
    "some tokens",
    "It depends on which tokens a text has, not on how many: others of that length are right.",
)
_TOKENS = 4  # different ones that a text needs to be like others
_FAR_BELOW = 10.0  # times the noise floors of a use that is right with other tokens


@dataclass(frozen=True)
class Probe:
    """Result of one use of the cache.

    ratio: its worst step in noise floors; None if it was not checked, for the reason in `note`.
    length: positions of the first wrong step. exact: whether all logits equal uncached ones bit for bit.
    finding: what it means if it is wrong, as far as was found out: a short key and a sentence. like: which other text
    has the logits of the first wrong step, in words; "" if none of those tried. step: what that step tried, in words;
    "" if its length says it. repeats: False if it was wrong and then right when it was run again. ids: of that step's
    text.
    """

    name: str
    ratio: float | None
    wrong: bool = False
    exact: bool = False
    length: int | None = None
    note: str = ""
    finding: tuple[str, str] = ("", "")
    like: str = ""
    step: str = ""
    repeats: bool = True
    ids: tuple[int, ...] = ()


def run_probes(case: Case, right: bool, uses: Sequence[Use], progress: Progress | None = None) -> tuple[Probe, ...]:
    """Run all uses. One that the model does not support is noted and does not count.

    right: whether the pattern is right on the text itself; else a use that is wrong shows nothing of its own.

    A use raises UnsupportedError if it does not apply to the model, CacheError if the cache fails.
    """
    probes = []
    for number, use in enumerate(uses):
        if progress is not None:
            progress(use.name, number, len(uses))
        probe = _run_surely(case, use)
        probes.append(replace(probe, finding=_finding(case, use, probe) if right or not probe.wrong else _DIFFERS_TOO))
    return tuple(probes)


def _finding(case: Case, use: Use, probe: Probe) -> tuple[str, str]:
    """What a use shows: what it is named for, unless it is right when it is run again, or with other tokens, or a
    simpler use is wrong too."""
    if not probe.repeats:
        return _UNREPEATED
    if not probe.wrong or probe.ratio is None or probe.length is None:
        return use.finding
    if not probe.like and _is_wrong_alone(case, use, probe):
        return _SOME_TOKENS
    if len(set(case.ids[0, :-1].tolist())) >= _TOKENS:
        familiar = _run(replace(case, familiar=True), use)
        if not familiar.wrong and familiar.ratio is not None and familiar.ratio * _FAR_BELOW <= probe.ratio:
            return _SOME_TOKENS
    simpler = None if use.simpler is None else use.simpler(probe.length)
    return simpler.finding if simpler is not None and _run(case, simpler).wrong else use.finding


def _is_wrong_alone(case: Case, use: Use, probe: Probe) -> bool:
    """Whether the text of the wrong step is wrong by itself, with a cache of its own, at a length where that of the
    case is right."""
    if use.of_tokens or not 1 < len(probe.ids) <= case.lengths[-1]:
        return False
    return _run(case, Use("the text alone", partial(steps_of, case.ids.new_tensor([probe.ids])), _SOME_TOKENS)).wrong


def _run_surely(case: Case, use: Use) -> Probe:
    """Run a use. If it is wrong, run it again: in a wider dtype, which decides if it is wrong by so little that it may
    be rounding, and as it was, since a probe that is right then does not show what its use is named for.

    16 bits hide faults, so a 16-bit model that is right is run in float32 as well.
    """
    probe = _run(case, use)
    if not probe.wrong:
        sharp = probe if probe.ratio is None or case.sharp is case else _run_surely(case.sharp, use)
        return sharp if sharp.wrong else probe
    if _is_rounding(case, use, probe):
        return replace(probe, wrong=False, length=None, like="")
    return replace(probe, repeats=_run(case, use).wrong)


def _is_rounding(case: Case, use: Use, probe: Probe) -> bool:
    """Whether what is wrong about a probe is rounding, as a wider dtype shows."""
    if probe.ratio is None or probe.ratio > BEYOND_DOUBT or case.wider is None:
        return False
    sharper = _run(case.wider, use)
    if sharper.ratio is None:
        return False
    dtypes = case.subject.dtype, case.wider.subject.dtype
    return is_rounding(probe.ratio, sharper.ratio, *dtypes) or _is_rounding(case.wider, use, sharper)


def _run(case: Case, use: Use) -> Probe:
    if use.rewinds and not case.subject.rewinds:
        return Probe(
            use.name,
            None,
            note="not checked: the model does not declare that its cache can be rewound (rewinds = True)",
        )
    worst, exact, length, like, words, ids = 0.0, True, None, "", "", ()
    before = case.subject.reused
    try:
        for check in use.run(case):
            judged = case.reference.judge(
                check.logits, case.reference.step_logits(check.ids, check.lengths), check.ids, check.lengths
            )
            worst, exact = max(worst, judged.ratio), exact and judged.exact
            if length is None and (step := judged.first_wrong) is not None:
                length, like = check.lengths[step], _like(case, check, step)
                words = check.words[step] if check.words else ""
                ids = tuple(check.ids[0, :length].tolist())
    except UnsupportedError as reason:
        return Probe(use.name, None, note=f"not checked: {reason}")
    except CacheError as error:
        return Probe(use.name, None, wrong=True, note=str(error))
    except CALL_ERRORS as error:
        return Probe(use.name, None, note=f"not checked: the model fails ({in_one_line(error)})")
    if length is None and before is not None and case.subject.reused == before:
        return Probe(use.name, None, note="not checked: the cache was not used; each call computed the whole text")
    return Probe(use.name, worst, length is not None, exact, length, like=like, step=words, ids=ids)


def _like(case: Case, check: Check, step: int) -> str:
    """Which other text the wrong logits belong to, if they are exactly what a cache with a known fault would return."""
    text = check.ids[:, : check.lengths[step]]
    for description, other in (*check.others.items(), *_shortened(text)):
        other = other[:, : text.shape[1]]
        if other.shape == text.shape and bool((other == text).all()):
            continue
        if case.close(check.logits[step], case.last_logits(other), other):
            return description
    return ""


def _shortened(text: Tensor) -> Iterator[tuple[str, Tensor]]:
    for missing in range(1, min(4, text.shape[1])):
        yield f"the text without its last {missing} token(s)", text[:, :-missing]
        yield f"the text without its first {missing} token(s)", text[:, missing:]
