"""A KV cache that knows the token ids its keys and values were computed from.

On each call the model hands it the whole sequence. The cache keeps the longest prefix that it has already
seen, forgets the rest, and answers with the ids that are left to compute. So it can never be used with a text
that it does not belong to, and reuse, editing, rewinding and rejected drafts need no further code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvgen.errors import CacheError

_MIN_CAPACITY = 64
_MOST_SLACK = 64


class KVCache:
    """Keys and values of every layer, and the ids behind them. One forward pass advances it once.

    owner: the model that writes the cache; another model refuses it. None until a model is first handed it.

    After a call, `reused` and `computed` say how many positions of it were found here and how many were not.
    """

    def __init__(self, owner: object | None = None) -> None:
        self.owner = owner
        self.reused = 0
        self.computed = 0
        self._length = 0
        self._variant = 0
        self._tokens = torch.empty(0, 0, dtype=torch.int64)  # (B, capacity)
        self._layers: list[_FullStore | _WindowStore] = []

    @property
    def length(self) -> int:
        """Number of positions that are cached. A layer with a window stores fewer."""
        return self._length

    @property
    def tokens(self) -> Tensor:
        """The ids that the cached positions were computed from, (B, length) int64."""
        return self._tokens[:, : self._length]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers for keys and values, room that is not used yet included."""
        return sum(buffer.nbytes for layer in self._layers for buffer in (layer.keys, layer.values))

    def match(self, ids: Tensor, variant: int = 0) -> Tensor:
        """Trim the cache to the longest prefix that it shares with `ids` and return the ids after it.

        ids: the whole sequence, (B, n) int64, n >= 1. The result is (B, n - reused); at least one position is
        always left to compute, since its logits are what the caller wants. Rows of a batch share one length, so
        the prefix ends where the first row differs. If a window has dropped what the prefix needs, nothing is
        reused.
        variant: what keys depend on besides their text; keys of another variant are not reused.
        """
        batch, n = ids.shape
        if batch != self._tokens.shape[0] or variant != self._variant:
            self.reset()
            self._tokens, self._variant = ids.new_empty(batch, 0), variant
        limit = min(self._length, n - 1)
        shared = _common_prefix(self._tokens[:, :limit], ids[:, :limit])
        self.trim(shared if self._can_trim(shared) else 0)
        self.reused = self._length
        self.computed = n - self._length
        return ids[:, self._length :]

    def append(self, layer: int, keys: Tensor, values: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; return the keys and values that they may see, and they themselves.

        keys, values: (B, H_kv, T, D). window: how many positions a query sees; None for all. Returns two
        (B, H_kv, S, D) views that end with the new positions: S is length + T, or min(length, window - 1) + T.
        The new positions do not count until `advance`, so a forward pass that is interrupted leaves the cache as
        it was.
        """
        if layer == len(self._layers):
            self._layers.append(_FullStore(keys, values) if window is None else _WindowStore(keys, values, window))
        return self._layers[layer].append(keys, values, self._length)

    def advance(self, ids: Tensor) -> None:
        """Count the positions that every layer has appended: `ids`, (B, T) int64, are their token ids."""
        end = self._length + ids.shape[1]
        if self._length == 0:
            self._tokens = ids.new_empty(ids.shape[0], 0)
        if end > self._tokens.shape[1]:
            self._tokens = _grow(self._tokens, max(end, 2 * self._tokens.shape[1], _MIN_CAPACITY), self._length, dim=1)
        self._tokens[:, self._length : end] = ids
        self._length = end
        for layer in self._layers:
            layer.commit()

    def trim(self, length: int) -> None:
        """Keep the first `length` positions and forget the rest.

        Raises CacheError if fewer are cached, or if a layer's window has dropped positions that the next one
        would have to see.
        """
        if not 0 <= length <= self._length:
            raise CacheError(f"cannot trim a cache of {self._length} positions to {length}")
        if not self._can_trim(length):
            raise CacheError(f"cannot trim to {length} positions: a sliding window has dropped what they need")
        if length == 0:
            self._layers.clear()
        self._length = length

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._length = 0
        self._tokens = torch.empty(0, 0, dtype=torch.int64)
        self._layers.clear()

    def _can_trim(self, length: int) -> bool:
        return length == 0 or all(layer.can_trim(length) for layer in self._layers)


class _FullStore:
    """Keys and values of all positions, (B, H_kv, capacity, D)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]

    def append(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        end = length + keys.shape[2]
        if end > self.keys.shape[2]:
            capacity = max(end, 2 * self.keys.shape[2], _MIN_CAPACITY)
            self.keys = _grow(self.keys, capacity, length, dim=2)
            self.values = _grow(self.values, capacity, length, dim=2)
        self.keys[:, :, length:end] = keys
        self.values[:, :, length:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def commit(self) -> None:
        """Nothing waits: what is written beyond the length does not count yet."""

    def can_trim(self, length: int) -> bool:
        return True


class _WindowStore:
    """Keys and values of the last positions alone, in order, so that what a query sees is one view.

    A buffer holds the window and some slack. When it is full, its end moves to the front of a new one; the slack
    makes that rare, and lets the cache be trimmed by as many positions at any time.

    first: the absolute position of the buffer's first entry.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int) -> None:
        self.window = window
        self.slack = _slack(window)
        self.first = 0
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self._moved: tuple[int, Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        end = length + keys.shape[2]
        seen = max(0, length - self.window + 1)  # the oldest position that the first new query sees
        kept = max(self.first, end - self.window + 1 - self.slack)
        if end - self.first <= self.keys.shape[2]:
            self._moved = None
            old, new = length - self.first, end - self.first
            self.keys[:, :, old:new] = keys
            self.values[:, :, old:new] = values
            return self.keys[:, :, seen - self.first : new], self.values[:, :, seen - self.first : new]
        start = min(seen, kept) - self.first
        both = tuple(
            torch.cat((stored[:, :, start : length - self.first], new), dim=2)
            for stored, new in ((self.keys, keys), (self.values, values))
        )
        used, visible = end - kept, end - seen
        capacity = min(window_capacity(self.window), max(2 * used, _MIN_CAPACITY))
        moved = [_grow(tensor[:, :, -used:], capacity, used, dim=2) for tensor in both]
        self._moved = (kept, moved[0], moved[1])  # not before `commit`: an interrupted pass must not lose positions
        return both[0][:, :, -visible:], both[1][:, :, -visible:]

    def commit(self) -> None:
        if self._moved is not None:
            self.first, self.keys, self.values = self._moved
            self._moved = None

    def can_trim(self, length: int) -> bool:
        return self.first <= max(0, length - self.window + 1)


def window_capacity(window: int) -> int:
    """The most positions that a layer with a window keeps: those that the next one sees, and twice the slack."""
    return window - 1 + 2 * _slack(window)


def _slack(window: int) -> int:
    return min(window, _MOST_SLACK)


def _common_prefix(a: Tensor, b: Tensor) -> int:
    """Length of the longest prefix that two (B, n) tensors share in every row."""
    if torch.equal(a, b):  # the case of every decoding step, and the cheap one
        return a.shape[1]
    return int((a != b).any(dim=0).nonzero()[0, 0])


def _grow(buffer: Tensor, capacity: int, used: int, dim: int) -> Tensor:
    """A buffer of `capacity` entries along `dim` with the first `used` ones of `buffer` in it.

    Callers double the capacity, which makes the copies a constant cost per position.
    """
    shape = list(buffer.shape)
    shape[dim] = capacity
    grown = buffer.new_empty(shape)
    grown.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return grown
