"""What a cache keeps for one layer: a `State`. For attention: keys and values of all positions, or of a window."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvgen.errors import CacheError
from kvgen.model.mixers import Attention, LatentAttention

MIN_CAPACITY = 64
_MAX_SLACK = 64
_SCALE_BYTES = 4


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of one layer, (B, H_kv, capacity, D) each. Entry 0 is the absolute position `first`.

    D may differ for keys and values.
    """

    keys: Tensor
    values: Tensor
    first: int

    @property
    def end(self) -> int:
        """The absolute position after the last entry."""
        return self.first + self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Held`."""
        return {"keys": self.keys, "values": self.values}

    def view(self, start: int, end: int) -> KeyValues:
        """Return positions `start` to `end`, sharing memory."""
        entries = slice(start - self.first, end - self.first)
        return KeyValues(self.keys[:, :, entries], self.values[:, :, entries], start)

    def copy(self, start: int, end: int, capacity: int) -> KeyValues:
        """Copy positions `start` to `end` into new buffers of `capacity` entries."""
        old = self.view(start, end)
        keys, values = (grow(part, capacity, end - start, dim=2) for part in (old.keys, old.values))
        return KeyValues(keys, values, start)


class Held(Protocol):
    """Views of what a layer keeps."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name; `State.restore` reads the same names. With the length of the text they say all there is to say."""


class State(Protocol):
    """What the cache keeps for one layer. `length` arguments are the number of cached positions, counted by the cache.

    A forward pass writes, and takes effect at `commit`; an interrupted pass therefore changes nothing.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, spare capacity included."""

    def nbytes_read(self, length: int) -> int:
        """Bytes that a step after the first `length` positions reads."""

    def commit(self) -> None:
        """End a pass: what it wrote counts."""

    def reach(self, length: int) -> int:
        """Return the longest length, at most `length`, that the state can be rewound to."""

    def branch(self, length: int, capacity: int) -> State:
        """Return a copy of the first `length` positions, with room for `capacity`."""

    def held(self, length: int) -> Held:
        """Return views of what is kept of the first `length` positions, without spare capacity."""

    def restore(self, held: Mapping[str, Tensor], length: int, capacity: int) -> None:
        """Copy the tensors of what `held` returned into this state. Raises CacheError if they do not fit the layer."""


def attention_state(mixer: Attention | LatentAttention, batch: int, dtype: torch.dtype, device: torch.device) -> State:
    """Create the empty state of a layer. dtype: of stored keys and values; int8 adds scales."""
    heads, *widths = mixer.stored
    shapes = [(batch, heads, 0, row_length(width, dtype)) for width in widths]
    keys, values = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    buffers = KeyValues(keys, values, 0)
    return FullState(buffers) if mixer.window is None else WindowState(buffers, mixer.window)


class FullState:
    """Keys and values of all positions."""

    def __init__(self, buffers: KeyValues) -> None:
        self.buffers = buffers

    @property
    def nbytes(self) -> int:
        return self.buffers.nbytes

    @property
    def moving(self) -> bool:
        """Whether `commit` will move the entries reserved last, so that the reservation is for one pass only."""
        return False

    def nbytes_read(self, length: int) -> int:
        return self.held(length).nbytes

    def reserve(self, length: int, count: int, capacity: int, max_length: int) -> KeyValues:
        """Make room for `count` positions after the first `length`; the caller fills it in.

        If buffers must grow, they double: to at least `capacity` and at most `max_length`, unless more is needed.
        """
        end, size = length + count, self.buffers.end
        if end > size:
            self.buffers = self.buffers.copy(0, length, max(end, min(max(2 * size, capacity), max_length)))
        return self.buffers

    def append(
        self, keys: Tensor, values: Tensor, length: int, capacity: int, max_length: int
    ) -> tuple[Tensor, Tensor]:
        """Write new positions, (B, H_kv, T, D), after the first `length`, with room as in `reserve`.

        Returns the keys and values visible to the new positions, including themselves at the end: (B, H_kv, S, D) each.
        """
        end = length + keys.shape[2]
        reserved = self.reserve(length, keys.shape[2], capacity, max_length)
        new, visible = reserved.view(length, end), reserved.view(self._first_visible(length), end)
        new.keys[:] = encode(keys, new.keys.dtype)
        new.values[:] = encode(values, new.values.dtype)
        return decode(visible.keys, keys.dtype), decode(visible.values, values.dtype)

    def read(self, length: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what `append` did in this pass, for `count` positions after the first `length`."""
        visible = self._written.view(self._first_visible(length), length + count)
        return decode(visible.keys, dtype), decode(visible.values, dtype)

    @property
    def _written(self) -> KeyValues:
        """The buffers of this pass."""
        return self.buffers

    def commit(self) -> None:
        pass

    def reach(self, length: int) -> int:
        return length if self.buffers.first <= self._first_visible(length) else 0

    def branch(self, length: int, capacity: int) -> State:
        other = copy(self)
        other.restore(self.held(length).tensors, length, capacity)
        return other

    def held(self, length: int) -> KeyValues:
        return self.buffers.view(self.buffers.first, length)

    def restore(self, held: Mapping[str, Tensor], length: int, capacity: int) -> None:
        if held.keys() != {"keys", "values"}:
            raise CacheError(f"a layer of {', '.join(sorted(held)) or 'nothing'}, not of keys and values")
        keys, values = held["keys"], held["values"]
        for part, own in ((keys, self.buffers.keys), (values, self.buffers.values)):
            if part.dtype != own.dtype or (*part.shape[:2], *part.shape[3:]) != (*own.shape[:2], own.shape[3]):
                raise CacheError(f"a layer of {part.dtype} and shape {tuple(part.shape)}")
        first = length - keys.shape[2]
        if not 0 <= first <= self._first_visible(length) or values.shape[2] != keys.shape[2]:
            raise CacheError(f"a layer with {keys.shape[2]} keys and {values.shape[2]} values for {length} tokens")
        kept = KeyValues(keys, values, first)
        self.buffers = kept.copy(first, length, self._capacity(length - first, capacity))

    def _capacity(self, used: int, capacity: int) -> int:
        """Entries of a restored buffer."""
        return max(used, capacity)

    def _first_visible(self, length: int) -> int:
        """The oldest position that position `length` attends to."""
        return 0


class WindowState(FullState):
    """Keys and values of the last positions, in order, so that what a query sees is one contiguous view.

    A buffer has room for the window and some slack. When it is full, its end is copied to the front of a new one. The
    slack makes copies rare, and is how far the cache can be rewound at any time.
    """

    def __init__(self, buffers: KeyValues, window: int) -> None:
        super().__init__(buffers)
        self.window = window
        self._pending: KeyValues | None = None  # buffers of this pass, until `commit` keeps their end

    @property
    def moving(self) -> bool:
        return self._pending is not None

    def reserve(self, length: int, count: int, capacity: int, max_length: int) -> KeyValues:
        """Make room after everything visible to the first new position. The final size depends only on the window."""
        end = length + count
        self._pending = None
        if end <= self.buffers.end:
            return self.buffers
        start = min(self._first_visible(length), self._first_kept(end))
        self._pending = self.buffers.copy(start, length, end - start)
        return self._pending

    @property
    def _written(self) -> KeyValues:
        return self.buffers if self._pending is None else self._pending

    def commit(self) -> None:
        if self._pending is not None:
            end = self._pending.end
            first = self._first_kept(end)
            self.buffers = self._pending.copy(first, end, window_capacity(self.window, end - first))
            self._pending = None

    def _capacity(self, used: int, capacity: int) -> int:
        return used

    def _first_visible(self, length: int) -> int:
        return max(0, length - self.window + 1)

    def _first_kept(self, end: int) -> int:
        return max(self.buffers.first, end - self.window + 1 - _slack(self.window))


def encode(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert (..., D) to a cache's dtype. For int8: (..., D + 4), the last four bytes being the fp32 scale."""
    if dtype != torch.int8:
        return numbers.to(dtype)
    wide = numbers.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, wide / scales, 0).round().to(torch.int8)
    return torch.cat((codes, scales.contiguous().view(torch.int8)), dim=-1)


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert `encode`: (..., D) of `dtype`."""
    if stored.dtype != torch.int8:
        return stored.to(dtype)
    scales = stored[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (stored[..., :-_SCALE_BYTES] * scales).to(dtype)


def row_length(head_dim: int, dtype: torch.dtype) -> int:
    """Numbers stored per head and position."""
    return head_dim + _SCALE_BYTES if dtype == torch.int8 else head_dim


def window_capacity(window: int, positions: int) -> int:
    """Entries of a sliding-window layer with `positions` cached: at most the window and twice the slack."""
    return min(window - 1 + 2 * _slack(window), max(2 * positions, MIN_CAPACITY))


def _slack(window: int) -> int:
    return min(window, _MAX_SLACK)


def grow(buffer: Tensor, capacity: int, used: int, dim: int) -> Tensor:
    """Copy the first `used` entries along `dim` into a new tensor with `capacity` entries."""
    shape = list(buffer.shape)
    shape[dim] = capacity
    grown = buffer.new_empty(shape)
    grown.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return grown
