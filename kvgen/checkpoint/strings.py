"""Many strings in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


class Strings:
    """A sequence of strings, each made when it is used: a list of the 262,144 tokens of a vocabulary takes 17 MB."""

    def __init__(self, texts: bytes, bounds: NDArray[np.int64]) -> None:
        """texts: all strings in UTF-8. bounds: ascending, (n + 1): string i is at bytes bounds[i] to bounds[i + 1].

        Raises UnicodeDecodeError if one is not UTF-8.
        """
        self._texts, self._bounds = texts, bounds
        leads = np.append(np.frombuffer(texts, np.uint8) & 0xC0 != 0x80, True)  # bytes that start a character
        texts.decode()  # together they may be UTF-8 although a bound divides a character
        divided = np.flatnonzero(~leads[bounds])
        if divided.size:
            at = int(bounds[divided[0]])
            raise UnicodeDecodeError("utf-8", texts, at, at + 1, "a character is divided")
        characters = np.concatenate(([0], np.cumsum(leads)))[bounds]
        self.longest = int(np.diff(characters).max(initial=0))  # in characters

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        texts, bounds = bytearray(), [0]
        for string in strings:
            texts += string.encode()
            bounds.append(len(texts))
        return cls(bytes(texts), np.array(bounds))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return self._texts[self._bounds[index] : self._bounds[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._bounds.tolist()):
            yield self._texts[start:end].decode()
