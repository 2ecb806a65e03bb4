"""Speculative decoding: drafters that propose tokens for the model to check in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kvgen.contract import Backend

MAX_DRAFT = 10  # tokens: checking a longer draft costs about as much as decoding it
_NGRAMS = (8, 5, 3)  # lengths that PromptLookup matches, longest first


class Drafter(Protocol):
    """Proposes tokens; `PromptLookup` and `DraftModel` are two.

    >>> class Repeat:
    ...     def draft(self, tokens, most):
    ...         return tokens[-1:][:most]
    ...
    ...     def learn(self, drafted, accepted):
    ...         pass
    >>> kvgen.generate(loaded, "Once upon a time,", kvgen.Sampling(temperature=0), max_tokens=6, drafter=Repeat())
    ' the city of Nova Haven was'
    """

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that may follow `tokens`, which only grow from call to call."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Receive how many tokens of the last draft were right, from its first on."""


class AdaptiveLength:
    """Draft length that grows after accepted drafts, shrinks after rejected ones, and pauses after repeated misses."""

    def __init__(self) -> None:
        self._length = 4
        self._misses = 0  # consecutive drafts whose first token was wrong
        self._pause = 0  # drafts to skip

    def length(self) -> int:
        """Return the length of the next draft; 0 to skip it."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._length

    def learn(self, drafted: int, accepted: int) -> None:
        """See `Drafter.learn`."""
        self._length = min(MAX_DRAFT, 2 * drafted) if accepted == drafted else max(2, accepted + 1)
        self._misses = 0 if accepted else min(self._misses + 1, 5)
        self._pause = 2**self._misses - 1


class PromptLookup(AdaptiveLength):
    """Drafts what followed the last 8, 5 or 3 tokens when they last occurred (Saxena 2023, prompt lookup decoding).

    >>> drafter = kvgen.PromptLookup()
    >>> kvgen.generate(loaded, "1, 2, 3, 4, 1, 2, 3,", kvgen.Sampling(temperature=0), max_tokens=6, drafter=drafter)
    ' 4, 5,'
    """

    def __init__(self) -> None:
        super().__init__()
        # For each length n: n-gram -> index of the token after its last occurrence.
        self._followed: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in _NGRAMS}
        self._known = 0

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter.draft`."""
        for end in range(self._known + 1, len(tokens)):  # nothing follows the last tokens yet
            for length, followed in self._followed.items():
                if end >= length:
                    followed[tuple(tokens[end - length : end])] = end
        self._known = max(self._known, len(tokens) - 1)
        found = (followed.get(tuple(tokens[-length:])) for length, followed in self._followed.items())
        start = next((index for index in found if index is not None), None)
        return [] if start is None else list(tokens[start : start + min(self.length(), most)])


class DraftModel(AdaptiveLength):
    """Drafts with a smaller model of the same vocabulary (Leviathan et al. 2023, arXiv:2211.17192).

    >>> drafter = kvgen.DraftModel(loaded.model)  # usually a smaller one
    >>> kvgen.generate(loaded, "Once upon a time,", kvgen.Sampling(temperature=0), max_tokens=6, drafter=drafter)
    ' the city of Nova Haven was'
    """

    def __init__(self, model: Backend) -> None:
        super().__init__()
        self._model = model
        self._cache: Any = None

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter.draft`."""
        known, length = len(tokens), min(self.length(), most)
        if self._model.context_length is not None:
            length = min(length, self._model.context_length - known)
        ids = self._model.ids_tensor([*tokens, *[0] * max(0, length)])
        for end in range(known, known + length):
            logits, self._cache = self._model(ids[:, :end], self._cache)
            ids[0, end] = logits[0, -1].argmax()
        drafted: list[int] = ids[0, known:].tolist()
        return drafted
