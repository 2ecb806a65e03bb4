"""A KV cache that knows the token ids it was computed from.

On each call the model hands it the whole sequence. The cache keeps the longest prefix that it has already seen, forgets
the rest, and answers with the ids that are left to compute. So it can never be used with a text that it does not belong
to, and reuse, editing, rewinding and rejected drafts need no further code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from kvgen.errors import CacheError
from kvgen.model.config import Attention, DecoderConfig
from kvgen.model.states import MIN_CAPACITY, KeyValues, State, grow, row_length, window_capacity


class KVCache:
    """The ids that are cached, and a state for each layer. One forward pass advances it once.

    owner: the model that writes the cache; another model refuses it. None until a model is first handed it.
    dtype: to store keys and values in, bf16 or int8 with a scale for each position and head; None for their own.
    capacity: positions to have room for when buffers are made. More can come; then buffers move.
    most: positions that it will come to hold, beyond which no capacity is spare; None if that is not known.

    Attribute `states`: of the layers; none before the first pass. After a call, `reused` and `computed` say how many
    positions of it were found here and how many were not.
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
        self.states: list[State] = []
        self.reused = 0
        self.computed = 0
        self._length = 0
        self._variant = 0
        self._tokens = torch.empty(0, 0, dtype=torch.int64)  # (B, capacity)
        self._reserved: tuple[KeyValues, ...] = ()
        self._end = 0  # how many positions fit into _reserved

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
        """Bytes of all buffers, spare capacity included."""
        return sum(state.nbytes for state in self.states)

    @property
    def nbytes_held(self) -> int:
        """Bytes in use, without spare capacity: what a step reads."""
        return sum(held.nbytes for held in self.held())

    @property
    def variant(self) -> int:
        """What the states depend on besides their text; see `match`."""
        return self._variant

    def held(self) -> tuple[KeyValues, ...]:
        """What each layer keeps, without spare capacity."""
        return tuple(state.held(self._length) for state in self.states)

    def restore(self, tokens: Tensor, layers: Iterable[KeyValues], variant: int) -> None:
        """Copy what `held` gave, and take over the ids behind it, (B, length).

        `states` must be there, as a model makes them. Raises CacheError for what does not fit them.
        """
        length = tokens.shape[1]
        self.expect(length)
        pairs = zip(self.states, layers, strict=True)  # one after the other: they may be read from a file
        self.states = [state.restored(held, length, self.capacity) for state, held in pairs]
        self._tokens, self._length, self._variant, self._reserved = tokens, length, variant, ()

    def match(self, ids: Tensor, variant: int = 0, least: int = 1) -> Tensor:
        """Go back to the longest prefix that is shared with `ids` and return the ids after it.

        ids: the whole sequence, (B, n) int64, n >= 1. The result is (B, n - reused); `least` positions at its end are
        always left to compute, since their logits are what the caller wants. Rows of a batch share one length, so the
        prefix ends where the first row differs. A state that cannot go back so far makes the prefix shorter.
        variant: what states depend on besides their text; a cache of another variant is not reused.
        """
        batch, n = ids.shape
        if batch != self._tokens.shape[0] or variant != self._variant:
            self.reset()
            self._tokens, self._variant = ids.new_empty(batch, 0), variant
        limit = min(self._length, n - least)
        shared = _common_prefix(self._tokens[:, :limit], ids[:, :limit])
        if shared < self._length:
            self.trim(self._reach(shared))
        self.reused = self._length
        self.computed = n - self._length
        return ids[:, self._length :]

    def expect(self, length: int) -> None:
        """Have room for a sequence of this length, and some steps more, when buffers next have to move."""
        if length > self.capacity:
            self.capacity = length + length // 8

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer, (B, H_kv, T, D); return what they may see, as `State.append` does.

        They do not count until `advance`, so a forward pass that is interrupted leaves the cache as it was.
        """
        self._reserved = ()
        return self.states[layer].append(keys, values, self._length, self.capacity, self.most)

    def reserve(self, count: int) -> tuple[KeyValues, ...]:
        """Make room for `count` new positions in all layers at once, for a writer that fills it in itself.

        Returns the same object again as long as no buffer moved.
        """
        if not self._reserved or self._length + count > self._end:
            reserved = tuple(state.reserve(self._length, count, self.capacity, self.most) for state in self.states)
            # A window's buffer that moves does so when the pass is over: its room is for this pass alone.
            moving = any(state.moving for state in self.states)
            self._reserved, self._end = () if moving else reserved, min(room.end for room in reserved)
            return reserved
        return self._reserved

    def advance(self, ids: Tensor) -> None:
        """Count the positions that every layer has appended: `ids`, (B, T) int64, are their token ids."""
        end = self._length + ids.shape[1]
        if self._length == 0:
            self._tokens = ids.new_empty(ids.shape[0], 0)
        if end > self._tokens.shape[1]:
            self._tokens = grow(self._tokens, max(end, 2 * self._tokens.shape[1], self.capacity), self._length, dim=1)
        self._tokens[:, self._length : end] = ids
        self._length = end
        for state in self.states:
            state.commit()

    def shared(self, ids: Tensor, variant: int = 0) -> int:
        """How many positions of a sequence, (B, n), `match` would find here."""
        if variant != self._variant or ids.shape[0] != self._tokens.shape[0]:
            return 0
        limit = min(self._length, ids.shape[1] - 1)
        return self._reach(_common_prefix(self._tokens[:, :limit], ids[:, :limit]))

    def branch(self, length: int, capacity: int, most: int | None = None) -> KVCache:
        """A copy of the first `length` positions, for another text to go on from.

        capacity, most: as of any cache. Raises CacheError where `trim` would.
        """
        self._check_trim(length)
        other = KVCache(self.owner, self.dtype, capacity, most)
        if length:
            other._tokens, other._length, other._variant = self._tokens[:, :length].clone(), length, self._variant
            other.states = [state.branch(length, other.capacity) for state in self.states]
        return other

    def trim(self, length: int) -> None:
        """Keep the first `length` positions and forget the rest.

        Raises CacheError if fewer are cached, or if a state cannot go back to that length.
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

    def _forget(self) -> None:
        self.states, self._reserved = [], ()

    def _check_trim(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise CacheError(f"cannot trim a cache of {self._length} positions to {length}")
        if self._reach(length) != length:
            raise CacheError(f"cannot trim to {length} positions: a sliding window has dropped what they need")

    def _reach(self, length: int) -> int:
        """The longest length, at most `length`, that every state can go back to."""
        while (reached := min((state.reach(length) for state in self.states), default=length)) < length:
            length = reached
        return length


def cache_bytes(config: DecoderConfig, positions: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the buffers, keys and values of `dtype`, when so many positions are cached and no more will be."""
    return sum(
        _position_bytes(layer.mixer, dtype)
        * (positions if layer.mixer.window is None else window_capacity(layer.mixer.window, positions))
        for layer in config.layers
    )


def position_bytes(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of keys and values of one more position, while every layer keeps it."""
    return sum(_position_bytes(layer.mixer, dtype) for layer in config.layers)


def _position_bytes(mixer: Attention, dtype: torch.dtype) -> int:
    return 2 * mixer.kv_heads * row_length(mixer.head_dim, dtype) * dtype.itemsize


def _common_prefix(a: Tensor, b: Tensor) -> int:
    """Length of the longest prefix that two (B, n) tensors share in every row."""
    if torch.equal(a, b):  # the case of every decoding step, and the cheap one
        return a.shape[1]
    return int((a != b).any(dim=0).nonzero()[0, 0])
