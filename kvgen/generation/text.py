"""Steps in, text out: characters only when they are whole, and nothing of a stop text or after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvgen.generation.completion import FinishReason, Step
from kvgen.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """Text released by one step; it may be empty. All chunks together are the completion.

    finish_reason: set on the last chunk alone.
    """

    text: str
    step: Step
    finish_reason: FinishReason | None


class CompletionText:
    """Turns the steps of one completion into chunks, one for each, until a stop text occurs."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._matcher = StopMatcher(stop)

    def add(self, step: Step) -> Chunk:
        """The chunk of a step. After one with a finish_reason there are no more."""
        text = self._detokenizer.add(step.token)
        if step.finish_reason:
            text += self._detokenizer.flush()
        certain = self._matcher.add(text)
        if self._matcher.stopped:
            return Chunk(certain, step, "stop")
        if step.finish_reason:
            certain += self._matcher.flush()
        return Chunk(certain, step, step.finish_reason)


class StopMatcher:
    """Passes text on until one of the stop texts occurs in it, however it is cut into pieces.

    Text that may turn out to be the beginning of a stop text is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._held = ""

    def add(self, piece: str) -> str:
        """The text that is certain to come before any stop text."""
        text = self._held + piece
        found = [position for position in map(text.find, self._stop) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
