"""Guesses at what comes next, for the model to check many at once. They change how fast a text comes, not which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kvgen.contract import Backend

MOST = 10  # tokens of a draft: beyond it, checking costs about what steps would
_GRAMS = (8, 5, 3)  # how many tokens must have occurred before, for what followed them to be a guess


class Drafter(Protocol):
    """Guesses tokens."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which grow from call to call."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Told how many tokens of a draft the model would have chosen too, from its first on."""


class Confidence:
    """How long a draft is worth making: longer after one that was right, and after wrong ones none for a while."""

    def __init__(self) -> None:
        self._length = 4
        self._wrong = 0  # drafts in a row whose first token was wrong
        self._pause = 0  # chances to let go by

    def length(self) -> int:
        """The length for the next draft."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._length

    def learn(self, drafted: int, accepted: int) -> None:
        """See `Drafter.learn`."""
        self._length = min(MOST, 2 * drafted) if accepted == drafted else max(2, accepted + 1)
        self._wrong = 0 if accepted else min(self._wrong + 1, 5)
        self._pause = 2**self._wrong - 1


class PromptLookup:
    """What followed the last tokens when they last occurred (Saxena 2023, prompt lookup decoding).

    The more of them occurred together, the better the guess: eight are looked for, then five, then three.
    """

    def __init__(self) -> None:
        self._confidence = Confidence()
        # For each length: so many tokens, and the index of what came after them.
        self._followed: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in _GRAMS}
        self._known = 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        for end in range(self._known + 1, len(tokens)):  # the last ones have nothing after them yet
            for length, followed in self._followed.items():
                if end >= length:
                    followed[tuple(tokens[end - length : end])] = end
        self._known = max(self._known, len(tokens) - 1)
        found = (followed.get(tuple(tokens[-length:])) for length, followed in self._followed.items())
        start = next((index for index in found if index is not None), None)
        if start is None:
            return []
        return list(tokens[start : start + min(self._confidence.length(), most)])

    def learn(self, drafted: int, accepted: int) -> None:
        """See `Drafter`."""
        self._confidence.learn(drafted, accepted)


class DraftModel:
    """What a smaller model with the same vocabulary finds most likely (Leviathan et al. 2023, arXiv:2211.17192)."""

    def __init__(self, model: Backend) -> None:
        self._model = model
        self._cache: Any = None
        self._confidence = Confidence()

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter`."""
        known, length = len(tokens), min(self._confidence.length(), most)
        if self._model.context_length is not None:
            length = min(length, self._model.context_length - known)
        ids = torch.tensor([[*tokens, *[0] * max(0, length)]], device=self._model.device)
        for end in range(known, known + length):
            logits, self._cache = self._model(ids[:, :end], self._cache)
            ids[0, end] = logits[0, -1].argmax()
        drafted: list[int] = ids[0, known:].tolist()
        return drafted

    def learn(self, drafted: int, accepted: int) -> None:
        """See `Drafter`."""
        self._confidence.learn(drafted, accepted)
