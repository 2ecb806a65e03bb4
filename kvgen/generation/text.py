"""From steps to text: whole characters only, cut before stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvgen.generation.step import FinishReason, Step

if TYPE_CHECKING:
    from kvgen.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """Text released by one step, possibly empty; all chunks together are the completion.

        >>> *_, last = kvgen.stream(loaded, "The capital of France is", kvgen.Sampling(temperature=0), max_tokens=2)
        >>> last.text, last.finish_reason
        ('.', 'length')

    finish_reason: `eos`, `stop`, `length` or `context` on the last chunk, None before.
    """

    text: str
    step: Step
    finish_reason: FinishReason | None


class CompletionText:
    """Turns each step of one completion into a chunk, until a stop string occurs."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._matcher = StopMatcher(stop)

    def add(self, step: Step) -> Chunk:
        """Return the chunk of a step. A chunk with a finish_reason is the last one."""
        text = self._detokenizer.add(step.token)
        if step.finish_reason:
            text += self._detokenizer.flush()
        released = self._matcher.add(text)
        if self._matcher.stopped:
            return Chunk(released, step, "stop")
        if step.finish_reason:
            released += self._matcher.flush()
        return Chunk(released, step, step.finish_reason)


class StopMatcher:
    """Passes on text up to the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._held = ""

    def add(self, piece: str) -> str:
        """Return the text that precedes any stop string."""
        text = self._held + piece
        found = [position for position in map(text.find, self._stop) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
