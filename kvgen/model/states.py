"""What a cache keeps for one layer: a `State`. For attention, keys and values of all positions or of a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvgen.errors import CacheError
from kvgen.model.config import Attention

MIN_CAPACITY = 64
_MOST_SLACK = 64
_SCALE_BYTES = 4


@dataclass(frozen=True)
class KeyValues:
    """Buffers of one layer, (B, H_kv, capacity, D) each. Their entry 0 is the absolute position `first`."""

    keys: Tensor
    values: Tensor
    first: int

    @property
    def end(self) -> int:
        """The absolute position behind the last one that fits."""
        return self.first + self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class State(Protocol):
    """What a layer keeps of the positions that are cached. `length` is their number, which the cache counts.

    What a pass writes counts only after `commit`, so that an interrupted pass changes nothing.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, spare capacity included."""

    @property
    def moving(self) -> bool:
        """Whether what was reserved last is kept elsewhere once the pass is over."""

    def reserve(self, length: int, count: int, least: int, most: int) -> KeyValues:
        """Make room for `count` positions behind the first `length`.

        Where buffers have to move they double, from `least` positions on and up to `most`, unless more are needed.
        """

    def append(self, keys: Tensor, values: Tensor, length: int, least: int, most: int) -> tuple[Tensor, Tensor]:
        """Write new positions, (B, H_kv, T, D), behind the first `length`; the rest is as for `reserve`.

        Returns the keys and values that the new positions may see, they themselves last: (B, H_kv, S, D) each.
        """

    def commit(self) -> None:
        """The pass is over: what it wrote counts."""

    def reach(self, length: int) -> int:
        """The longest length, at most `length`, that it can go back to."""

    def branch(self, length: int, capacity: int) -> State:
        """A copy of the first `length` positions, with room for `capacity`."""

    def held(self, length: int) -> KeyValues:
        """What is here of the first `length` positions, without spare capacity."""

    def restored(self, held: KeyValues, length: int, capacity: int) -> State:
        """A copy of what `held` gave, for a layer of this kind. Raises CacheError for what does not fit."""


def new_state(mixer: Attention, batch: int, dtype: torch.dtype, device: torch.device) -> State:
    """The state of a layer before its first position. dtype: to store keys and values in, int8 with scales."""
    shape = (batch, mixer.kv_heads, 0, row_length(mixer.head_dim, dtype))
    keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    return FullState(keys, values) if mixer.window is None else WindowState(keys, values, mixer.window)


class FullState:
    """Keys and values of all positions, (B, H_kv, capacity, D)."""

    moving = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, length: int, count: int, least: int, most: int) -> KeyValues:
        end = length + count
        if end > self.keys.shape[2]:
            capacity = max(end, min(max(2 * self.keys.shape[2], least), most))
            self.keys = grow(self.keys, capacity, length, dim=2)
            self.values = grow(self.values, capacity, length, dim=2)
        return KeyValues(self.keys, self.values, 0)

    def append(self, keys: Tensor, values: Tensor, length: int, least: int, most: int) -> tuple[Tensor, Tensor]:
        return _written(self.reserve(length, keys.shape[2], least, most), keys, values, length, 0)

    def commit(self) -> None:
        pass

    def reach(self, length: int) -> int:
        return length

    def branch(self, length: int, capacity: int) -> FullState:
        keys, values = (grow(stored, max(length, capacity), length, dim=2) for stored in (self.keys, self.values))
        return FullState(keys, values)

    def held(self, length: int) -> KeyValues:
        return KeyValues(self.keys[:, :, :length], self.values[:, :, :length], 0)

    def restored(self, held: KeyValues, length: int, capacity: int) -> FullState:
        _check_fit(held, self.keys, length, first_needed=0)
        return FullState(held.keys, held.values).branch(length, capacity)


class WindowState:
    """Keys and values of the last positions alone, in order, so that what a query sees is one view.

    A buffer holds the window and some slack. When it is full, its end moves to the front of a new one; the slack
    makes that rare, and lets the cache go back by as many positions at any time.

    first: the absolute position of the buffer's first entry.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int, first: int = 0) -> None:
        self.window = window
        self.slack = _slack(window)
        self.first = first
        self.keys, self.values = keys, values
        self._moving: tuple[KeyValues, int] | None = None

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def moving(self) -> bool:
        return self._moving is not None

    def reserve(self, length: int, count: int, least: int, most: int) -> KeyValues:
        """After all that the first of the new positions sees; the buffer's size depends on the window alone."""
        end = length + count
        self._moving = None
        if end <= self.first + self.keys.shape[2]:
            return KeyValues(self.keys, self.values, self.first)
        kept = max(self.first, end - self.window + 1 - self.slack)
        start = min(self._seen_from(length), kept)
        old = slice(start - self.first, length - self.first)
        keys, values = (
            grow(stored[:, :, old], end - start, length - start, dim=2) for stored in (self.keys, self.values)
        )
        room = KeyValues(keys, values, start)
        self._moving = (room, kept)  # not before `commit`: an interrupted pass must not lose positions
        return room

    def append(self, keys: Tensor, values: Tensor, length: int, least: int, most: int) -> tuple[Tensor, Tensor]:
        room = self.reserve(length, keys.shape[2], least, most)
        return _written(room, keys, values, length, self._seen_from(length))

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

    def reach(self, length: int) -> int:
        return length if self.first <= self._seen_from(length) else 0

    def branch(self, length: int, capacity: int) -> WindowState:
        room = self.held(length)
        return WindowState(room.keys.clone(), room.values.clone(), self.window, self.first)

    def held(self, length: int) -> KeyValues:
        count = length - self.first
        return KeyValues(self.keys[:, :, :count], self.values[:, :, :count], self.first)

    def restored(self, held: KeyValues, length: int, capacity: int) -> WindowState:
        _check_fit(held, self.keys, length, first_needed=self._seen_from(length))
        return WindowState(held.keys.clone(), held.values.clone(), self.window, held.first)

    def _seen_from(self, length: int) -> int:
        """The oldest position that the next one sees."""
        return max(0, length - self.window + 1)


def _written(room: KeyValues, keys: Tensor, values: Tensor, length: int, seen: int) -> tuple[Tensor, Tensor]:
    """Write new positions, (B, H_kv, T, D), into a room; return what is there from position `seen` on."""
    old, new = length - room.first, length - room.first + keys.shape[2]
    room.keys[:, :, old:new] = encoded(keys, room.keys.dtype)
    room.values[:, :, old:new] = encoded(values, room.values.dtype)
    seen -= room.first
    return decoded(room.keys[:, :, seen:new], keys.dtype), decoded(room.values[:, :, seen:new], values.dtype)


def _check_fit(held: KeyValues, buffer: Tensor, length: int, first_needed: int) -> None:
    """Raises CacheError for keys and values of other shapes than a buffer's, or of other positions than are needed."""
    batch, heads, _, width = buffer.shape
    for tensor in (held.keys, held.values):
        if tensor.dtype != buffer.dtype or (*tensor.shape[:2], *tensor.shape[3:]) != (batch, heads, width):
            raise CacheError(f"a layer of {tensor.dtype} and shape {tuple(tensor.shape)}")
    if held.end != length or not 0 <= held.first <= first_needed or held.values.shape[2] != held.keys.shape[2]:
        raise CacheError(f"a layer has positions {held.first} to {held.end}, not those of {length} tokens")


def encoded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., D) as a cache of this dtype keeps them. For int8: (..., D + 4), the four bytes of the fp32 scale last."""
    if dtype != torch.int8:
        return numbers.to(dtype)
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


def row_length(head_dim: int, dtype: torch.dtype) -> int:
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
