"""Where a cache keeps the keys and values of one layer: all positions, or the last ones of a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_CAPACITY = 64
_MOST_SLACK = 64
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Room:
    """The buffers of one layer, (B, H_kv, capacity, D) each. Their entry 0 is the absolute position `first`."""

    keys: Tensor
    values: Tensor
    first: int

    @property
    def end(self) -> int:
        """The absolute position behind the last one that there is room for."""
        return self.first + self.keys.shape[2]


class FullStore:
    """Keys and values of all positions, (B, H_kv, capacity, D)."""

    moving = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def reserve(self, length: int, count: int, least: int, most: int) -> Room:
        """Room for `count` positions behind the first `length`.

        If buffers have to move, they double, from `least` positions on and up to `most`, unless more are needed.
        """
        end = length + count
        if end > self.keys.shape[2]:
            capacity = max(end, min(max(2 * self.keys.shape[2], least), most))
            self.keys = grow(self.keys, capacity, length, dim=2)
            self.values = grow(self.values, capacity, length, dim=2)
        return Room(self.keys, self.values, 0)

    def held(self, length: int) -> Room:
        """What is here of the first `length` positions."""
        return Room(self.keys[:, :, :length], self.values[:, :, :length], 0)

    def branch(self, length: int, capacity: int) -> FullStore:
        """A store of its own with the first `length` positions, and room for `capacity`."""
        keys, values = (grow(stored, max(length, capacity), length, dim=2) for stored in (self.keys, self.values))
        return FullStore(keys, values)


class WindowStore:
    """Keys and values of the last positions alone, in order, so that what a query sees is one view.

    A buffer holds the window and some slack. When it is full, its end moves to the front of a new one; the slack
    makes that rare, and lets the cache be trimmed by as many positions at any time.

    first: the absolute position of the buffer's first entry.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int, first: int = 0) -> None:
        self.window = window
        self.slack = _slack(window)
        self.first = first
        self.keys, self.values = keys, values
        self._moving: tuple[Room, int] | None = None

    @property
    def moving(self) -> bool:
        """Whether what was reserved last is kept elsewhere once the pass is over."""
        return self._moving is not None

    def reserve(self, length: int, count: int, least: int, most: int) -> Room:
        """Room for `count` positions behind the first `length`, after all that the first of them sees."""
        end = length + count
        self._moving = None
        if end <= self.first + self.keys.shape[2]:
            return Room(self.keys, self.values, self.first)
        seen = max(0, length - self.window + 1)
        kept = max(self.first, end - self.window + 1 - self.slack)
        start = min(seen, kept)
        old = slice(start - self.first, length - self.first)
        keys, values = (
            grow(stored[:, :, old], end - start, length - start, dim=2) for stored in (self.keys, self.values)
        )
        room = Room(keys, values, start)
        self._moving = (room, kept)  # not before `commit`: an interrupted pass must not lose positions
        return room

    def held(self, length: int) -> Room:
        """What is here of the first `length` positions."""
        count = length - self.first
        return Room(self.keys[:, :, :count], self.values[:, :, :count], self.first)

    def branch(self, length: int, capacity: int) -> WindowStore:
        """A store of its own with what is here of the first `length` positions."""
        room = self.held(length)
        return WindowStore(room.keys.clone(), room.values.clone(), self.window, self.first)

    def commit(self) -> None:
        """Keep the end of what `reserve` gave room for, if that was not the buffer itself."""
        if self._moving is None:
            return
        room, kept = self._moving
        used = room.end - kept
        capacity = window_capacity(self.window, used)
        self.keys, self.values = (
            grow(tensor[:, :, -used:], capacity, used, dim=2) for tensor in (room.keys, room.values)
        )
        self.first, self._moving = kept, None

    def can_trim(self, length: int) -> bool:
        return self.first <= max(0, length - self.window + 1)


def encoded(numbers: Tensor, dtype: torch.dtype | None) -> Tensor:
    """(..., D) as a cache of this dtype keeps them. For int8: (..., D + 4), the four bytes of the fp32 scale last."""
    if dtype != torch.int8:
        return numbers if dtype is None else numbers.to(dtype)
    wide = numbers.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, wide / scales, 0).round().to(torch.int8)
    return torch.cat((codes, scales.contiguous().view(torch.int8)), dim=-1)


def decoded(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What `encoded` keeps, (..., D) of `dtype`."""
    if stored.dtype != torch.int8:
        return stored.to(dtype)
    scales = stored[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (stored[..., :-_SCALE_BYTES] * scales).to(dtype)


def row_length(head_dim: int, dtype: torch.dtype | None) -> int:
    """How many numbers a cache of this dtype keeps for a head's `head_dim`."""
    return head_dim + _SCALE_BYTES if dtype == torch.int8 else head_dim


def window_capacity(window: int, positions: int) -> int:
    """The most that a layer with a window has room for while so many positions are cached.

    In the end those that the next one sees, and twice the slack.
    """
    return min(window - 1 + 2 * _slack(window), max(2 * positions, MIN_CAPACITY))


def _slack(window: int) -> int:
    return min(window, _MOST_SLACK)


def grow(buffer: Tensor, capacity: int, used: int, dim: int) -> Tensor:
    """A buffer of `capacity` entries along `dim` with the first `used` ones of `buffer` in it.

    Callers double the capacity, which makes the copies a constant cost per position.
    """
    shape = list(buffer.shape)
    shape[dim] = capacity
    grown = buffer.new_empty(shape)
    grown.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return grown
