"""A KV cache that knows the token ids its keys and values were computed from.

On each call the model hands it the whole sequence. The cache keeps the longest prefix that it has already
seen, forgets the rest, and answers with the ids that are left to compute. So it can never be used with a text
that it does not belong to, and reuse, editing, rewinding and rejected drafts need no further code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvgen.errors import CacheError
from kvgen.model.config import DecoderConfig
from kvgen.model.stores import (
    MIN_CAPACITY,
    FullStore,
    Room,
    WindowStore,
    decoded,
    encoded,
    grow,
    row_length,
    window_capacity,
)


class KVCache:
    """Keys and values of every layer, and the ids behind them. One forward pass advances it once.

    owner: the model that writes the cache; another model refuses it. None until a model is first handed it.
    dtype: to store keys and values in, bf16 or int8 with a scale for each position and head; None for their own.
    capacity: positions to have room for when buffers are made. More can come; then buffers move.
    most: positions that it will come to hold, beyond which there is no room to spare; None if that is not known.

    After a call, `reused` and `computed` say how many positions of it were found here and how many were not.
    """

    def __init__(
        self,
        owner: object | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = MIN_CAPACITY,
        most: int | None = None,
    ) -> None:
        self.owner, self.dtype, self.capacity = owner, dtype, capacity
        self.most = sys.maxsize if most is None else most
        self.reused = 0
        self.computed = 0
        self._length = 0
        self._variant = 0
        self._tokens = torch.empty(0, 0, dtype=torch.int64)  # (B, capacity)
        self._layers: list[FullStore | WindowStore] = []
        self._windowed: list[WindowStore] = []  # those of the layers that have a window
        self._rooms: tuple[Room, ...] = ()
        self._end = 0  # how many positions there is room for in _rooms

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

    @property
    def nbytes_held(self) -> int:
        """Bytes of the keys and values that are cached: what a step reads of them, and no room besides."""
        return sum(room.keys.nbytes + room.values.nbytes for room in self.held())

    @property
    def variant(self) -> int:
        """What the keys depend on besides their text; see `match`."""
        return self._variant

    def held(self) -> tuple[Room, ...]:
        """The keys and values of each layer, without room for more."""
        return tuple(layer.held(self._length) for layer in self._layers)

    def restore(self, tokens: Tensor, rooms: Iterable[Room], windows: Sequence[int | None], variant: int) -> None:
        """Copy what `held` gave, and take over the ids behind it, (B, length); `windows` as in `reserve`.

        Raises CacheError for layers whose positions are not those of the ids, or not those that their window needs.
        """
        length = tokens.shape[1]
        self.expect(length)
        layers: list[FullStore | WindowStore] = []
        for room, window in zip(rooms, windows, strict=True):  # one after the other: they may be read from a file
            first_needed = 0 if window is None else max(0, length - window + 1)
            if room.end != length or not 0 <= room.first <= first_needed or room.values.shape[2] != room.keys.shape[2]:
                raise CacheError(f"a layer has positions {room.first} to {room.end}, not those of {length} tokens")
            layer = (
                FullStore(room.keys, room.values)
                if window is None
                else WindowStore(room.keys, room.values, window, room.first)
            )
            layers.append(layer.branch(length, self.capacity))
        self._tokens, self._length, self._variant = tokens, length, variant
        self._forget()
        for layer in layers:
            self._hold(layer)

    def match(self, ids: Tensor, variant: int = 0, least: int = 1) -> Tensor:
        """Trim the cache to the longest prefix that it shares with `ids` and return the ids after it.

        ids: the whole sequence, (B, n) int64, n >= 1. The result is (B, n - reused); `least` positions at its end are
        always left to compute, since their logits are what the caller wants. Rows of a batch share one length, so
        the prefix ends where the first row differs. If a window has dropped what the prefix needs, nothing is
        reused.
        variant: what keys depend on besides their text; keys of another variant are not reused.
        """
        batch, n = ids.shape
        if batch != self._tokens.shape[0] or variant != self._variant:
            self.reset()
            self._tokens, self._variant = ids.new_empty(batch, 0), variant
        limit = min(self._length, n - least)
        shared = _common_prefix(self._tokens[:, :limit], ids[:, :limit])
        if shared < self._length:
            self.trim(shared if self._can_trim(shared) else 0)
        self.reused = self._length
        self.computed = n - self._length
        return ids[:, self._length :]

    def expect(self, length: int) -> None:
        """Have room for a sequence of this length, and some steps more, when buffers next have to move."""
        if length > self.capacity:
            self.capacity = length + length // 8

    def append(self, layer: int, keys: Tensor, values: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; return the keys and values that they may see, and they themselves.

        keys, values: (B, H_kv, T, D). window: how many positions a query sees; None for all. Returns two
        (B, H_kv, S, D) tensors that end with the new positions: S is length + T, or min(length, window - 1) + T.
        The new positions do not count until `advance`, so a forward pass that is interrupted leaves the cache as
        it was.
        """
        self._rooms = ()
        room = self._store(layer, keys, values, window).reserve(self._length, keys.shape[2], self.capacity, self.most)
        old, new = self._length - room.first, self._length - room.first + keys.shape[2]
        room.keys[:, :, old:new] = encoded(keys, self.dtype)
        room.values[:, :, old:new] = encoded(values, self.dtype)
        seen = 0 if window is None else max(0, self._length - window + 1)  # the oldest that the first new query sees
        seen -= room.first
        return decoded(room.keys[:, :, seen:new], keys.dtype), decoded(room.values[:, :, seen:new], values.dtype)

    def reserve(self, new: Tensor, windows: Sequence[int | None]) -> tuple[Room, ...]:
        """Room for new positions in all layers at once, for a writer that fills it in itself.

        new: what one layer appends, (B, H_kv, T, D); only its shape and type matter. windows: of each layer, as in
        `append`. Returns the same object again as long as no buffer moved.
        """
        count = new.shape[2]
        if not self._rooms or self._length + count > self._end:
            stores = [self._store(layer, new, new, window) for layer, window in enumerate(windows)]
            rooms = tuple(store.reserve(self._length, count, self.capacity, self.most) for store in stores)
            # A window's buffer that moves does so when the pass is over: its room is for this pass alone.
            self._rooms = () if any(store.moving for store in stores) else rooms
            self._end = min(room.end for room in rooms)
            return rooms
        return self._rooms

    def _store(self, layer: int, keys: Tensor, values: Tensor, window: int | None) -> FullStore | WindowStore:
        if layer == len(self._layers):
            keys, values = (encoded(tensor[:, :, :1], self.dtype)[:, :, :0] for tensor in (keys, values))
            self._hold(FullStore(keys, values) if window is None else WindowStore(keys, values, window))
        return self._layers[layer]

    def advance(self, ids: Tensor) -> None:
        """Count the positions that every layer has appended: `ids`, (B, T) int64, are their token ids."""
        end = self._length + ids.shape[1]
        if self._length == 0:
            self._tokens = ids.new_empty(ids.shape[0], 0)
        if end > self._tokens.shape[1]:
            self._tokens = grow(self._tokens, max(end, 2 * self._tokens.shape[1], self.capacity), self._length, dim=1)
        self._tokens[:, self._length : end] = ids
        self._length = end
        for layer in self._windowed:
            layer.commit()

    def shared(self, ids: Tensor, variant: int = 0) -> int:
        """How many positions of a sequence, (B, n), `match` would find here."""
        if variant != self._variant or ids.shape[0] != self._tokens.shape[0]:
            return 0
        limit = min(self._length, ids.shape[1] - 1)
        shared = _common_prefix(self._tokens[:, :limit], ids[:, :limit])
        return shared if self._can_trim(shared) else 0

    def branch(self, length: int, capacity: int, most: int | None = None) -> KVCache:
        """A cache of its own that begins with the first `length` positions of this one, for another text to go on from.

        capacity, most: as of any cache. Raises CacheError where `trim` would.
        """
        self._check_trim(length)
        other = KVCache(self.owner, self.dtype, capacity, most)
        if length:
            other._tokens, other._length, other._variant = self._tokens[:, :length].clone(), length, self._variant
            for layer in self._layers:
                other._hold(layer.branch(length, other.capacity))
        return other

    def trim(self, length: int) -> None:
        """Keep the first `length` positions and forget the rest.

        Raises CacheError if fewer are cached, or if a layer's window has dropped positions that the next one
        would have to see.
        """
        self._check_trim(length)
        if length == 0:
            self._forget()
        self._length = length

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._length = 0
        self._tokens = torch.empty(0, 0, dtype=torch.int64)
        self._forget()

    def _hold(self, layer: FullStore | WindowStore) -> None:
        self._layers.append(layer)
        if isinstance(layer, WindowStore):
            self._windowed.append(layer)

    def _forget(self) -> None:
        self._layers.clear()
        self._windowed.clear()
        self._rooms = ()

    def _check_trim(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise CacheError(f"cannot trim a cache of {self._length} positions to {length}")
        if not self._can_trim(length):
            raise CacheError(f"cannot trim to {length} positions: a sliding window has dropped what they need")

    def _can_trim(self, length: int) -> bool:
        return length == 0 or all(layer.can_trim(length) for layer in self._windowed)


def cache_bytes(config: DecoderConfig, positions: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the buffers for keys and values of `dtype`, when so many positions are cached and no more will be."""
    windows = (layer.window for layer in config.layers)
    return _layer_bytes(config, dtype) * sum(
        positions if window is None else window_capacity(window, positions) for window in windows
    )


def position_bytes(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of keys and values of one more position, while every layer keeps it."""
    return _layer_bytes(config, dtype) * len(config.layers)


def _layer_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one position in one layer."""
    return 2 * config.kv_heads * row_length(config.head_dim, dtype) * dtype.itemsize


def _common_prefix(a: Tensor, b: Tensor) -> int:
    """Length of the longest prefix that two (B, n) tensors share in every row."""
    if torch.equal(a, b):  # the case of every decoding step, and the cheap one
        return a.shape[1]
    return int((a != b).any(dim=0).nonzero()[0, 0])
