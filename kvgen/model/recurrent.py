"""What a cache keeps for a recurrent layer: the state after the last position, and snapshots of earlier ones.

A recurrent state cannot be cut, so a text that was edited or rewound goes on from the last snapshot before the change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Set
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from kvgen.errors import CacheError

RECENT = 16
"""The newest positions all have a snapshot, for rewinds and drafts."""

SPACING = 64
"""So does every 64th position after it; a long pass writes one for every fourth of these."""

_LONG_SPACING = 4 * SPACING
_MAX_BYTES, _MIN_SNAPSHOTS = 1 << 28, 4  # of all layers of one cache

Parts = tuple[Tensor, ...]  # a state, (B, ...) each
Core = Callable[[Parts, Parts], tuple[Tensor, Parts]]
"""A layer's recurrence: from the inputs at new positions, (B, T, ...) each, and the state before them, to the outputs,
(B, T, D), and the state after them. It writes into neither."""


def max_snapshots(nbytes: int) -> int:
    """The most snapshots that a cache keeps if one of all layers takes `nbytes`."""
    return max(_MIN_SNAPSHOTS, _MAX_BYTES // max(1, nbytes))


def snapshot_count(length: int, most: int) -> int:
    """The most snapshots that are kept of `length` positions, that after the last one included."""
    return min(most, length, RECENT + max(0, length - RECENT) // SPACING)


def snapshot_ends(start: int, end: int, wanted: Iterable[int]) -> list[int]:
    """Return the positions, ascending, after which a pass from `start` to `end` keeps a snapshot.

    All of a short pass; of a long one the positions in `wanted`, each 256th, and the last one.
    """
    if end - start <= RECENT:
        return list(range(start + 1, end + 1))
    regular = range(start - start % _LONG_SPACING + _LONG_SPACING, end, _LONG_SPACING)
    inside = {position for position in wanted if start < position < end}
    return sorted({*regular, *inside, end})


@dataclass(frozen=True)
class Snapshots:
    """States after some positions, ascending."""

    states: Mapping[int, Parts]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Held`: `state.P.I` is part I of the state after P positions."""
        return {f"state.{at}.{i}": part for at, parts in self.states.items() for i, part in enumerate(parts)}


class RecurrentState:
    """A `State` of any tensors. Snapshots are never written into, so caches share them.

    empty: the state before the first position. most: see `max_snapshots`.

    All layers keep snapshots of the same positions, since which to keep depends on positions only: the newest, each
    64th, and those that a pass was asked for. If there are more than `snapshot_count`, the least useful are dropped:
    those that save the least, which is the distance between their neighbours, for the distance from the end.
    """

    def __init__(self, empty: Parts, most: int) -> None:
        self.empty, self.most = empty, most
        self.snapshots: dict[int, Parts] = {}  # ascending
        self._asked: frozenset[int] = frozenset()
        self._pending: tuple[int, dict[int, Parts], frozenset[int]] | None = None  # of this pass, until `commit`

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.snapshots.values() for part in parts)

    def nbytes_read(self, length: int) -> int:
        return sum(part.nbytes for part in self._after(length))

    def run(self, core: Core, inputs: Parts, length: int, wanted: Set[int]) -> Tensor:
        """Run a recurrence over new positions, (B, T, ...) each, after the first `length`: (B, T, D).

        wanted: positions to keep a snapshot of besides those that `snapshot_ends` chooses itself.
        """
        end = length + inputs[0].shape[1]
        state, begin, outputs, written = self._after(length), length, [], {}
        for stop in snapshot_ends(length, end, wanted):
            piece = tuple(part[:, begin - length : stop - length] for part in inputs)
            output, state = core(piece, state)
            outputs.append(output)
            written[stop], begin = state, stop
        self._pending = length, written, frozenset(wanted & written.keys())
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def reserve(self, length: int, ends: Iterable[int], wanted: Set[int]) -> list[Parts]:
        """Make room for the states after `ends`, `snapshot_ends` of a pass, which the caller writes.

        Returns the state after the first `length` positions, to read, and those.
        """
        written = {end: tuple(torch.empty_like(part) for part in self.empty) for end in ends}
        self._pending = length, written, frozenset(wanted & written.keys())
        return [self._after(length), *written.values()]

    def commit(self) -> None:
        if self._pending is None:
            return
        start, written, asked = self._pending
        self._pending, end = None, max(written)
        self._asked = frozenset(at for at in self._asked if at <= start) | asked
        before = {at: parts for at, parts in self.snapshots.items() if at <= start}
        self.snapshots = self._thinned({**before, **written}, end)

    def reach(self, length: int) -> int:
        return max((at for at in self.snapshots if at <= length), default=0)

    def branch(self, length: int, capacity: int) -> RecurrentState:
        other = copy(self)
        other._pending = None
        other.snapshots = self._thinned({at: parts for at, parts in self.snapshots.items() if at <= length}, length)
        return other

    def held(self, length: int) -> Snapshots:
        """Without the newest ones that are not kept for long."""
        return Snapshots({at: parts for at, parts in self.snapshots.items() if at == length or self._stays(at)})

    def restore(self, held: Mapping[str, Tensor], length: int, capacity: int) -> None:
        found: dict[int, dict[int, Tensor]] = {}
        for name, part in held.items():
            match = re.fullmatch(r"state\.(\d{1,12})\.(\d)", name)
            if match is None:
                raise CacheError(f"a recurrent layer of {name!r:.40}")
            found.setdefault(int(match[1]), {})[int(match[2])] = part
        for at, parts in found.items():
            given = [(parts[i].dtype, parts[i].shape) for i in sorted(parts)]
            if not 0 < at <= length or given != [(part.dtype, part.shape) for part in self.empty]:
                raise CacheError(f"a recurrent layer of other sizes after {at} positions")
        if length and length not in found:
            raise CacheError(f"a recurrent layer without its state after {length} positions")
        self._asked = frozenset(at for at in found if at != length)
        states = {at: tuple(found[at][i].clone() for i in range(len(self.empty))) for at in sorted(found)}
        self.snapshots = self._thinned(states, length)

    def _after(self, length: int) -> Parts:
        return self.snapshots[length] if length else self.empty

    def _stays(self, at: int) -> bool:
        """Whether a snapshot is kept when it is not among the newest."""
        return at % SPACING == 0 or at in self._asked

    def _thinned(self, states: dict[int, Parts], end: int) -> dict[int, Parts]:
        kept = {at: parts for at, parts in states.items() if at > end - RECENT or self._stays(at)}
        most = snapshot_count(end, self.most)
        while len(kept) > most:
            del kept[_least_useful(list(kept), end)]
        return kept


def _least_useful(positions: list[int], end: int) -> int:
    """Return the one of ascending positions, but for the last, that saves least; see `RecurrentState`."""
    neighbours = zip([0, *positions], positions, positions[1:], strict=False)
    return min(neighbours, key=lambda three: (three[2] - three[0]) / (end - three[1]))[1]
