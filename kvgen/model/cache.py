"""A KV cache that stores the token ids it was computed from.

The model passes it the whole sequence on each call. The cache keeps the longest prefix it has already computed, drops
the rest, and returns the ids that are left to compute. It can therefore never be used with the wrong text, and prefix
reuse, editing, rewinding and rejected drafts need no further code.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kvgen.errors import CacheError
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import Attention, LatentAttention, Mixer, Recurrent
from kvgen.model.recurrent import Core, Parts, RecurrentState, max_snapshots, snapshot_count, snapshot_ends
from kvgen.model.states import (
    MIN_CAPACITY,
    FullState,
    Held,
    KeyValues,
    State,
    attention_state,
    grow,
    row_length,
    window_capacity,
)


class KVCache:
    """The cached token ids and one state per mixer. Each forward pass advances it once.

        >>> _, cache = loaded.model(torch.tensor([[1, 2, 3]]), None)
        >>> type(cache).__name__, cache.length, cache.tokens.tolist()
        ('KVCache', 3, [[1, 2, 3]])

    owner: the model that writes the cache, set on first use; other models refuse it.
    dtype: of stored keys and values: bf16, or int8 with a scale per position and head; None for the model's own.
    capacity: positions to allocate for; buffers grow if more come.
    max_length: positions beyond which no spare capacity is allocated; None if unknown.

    Attributes: `length`, the number of cached positions (a layer with a window stores fewer); `states`, one per mixer,
    empty before the first pass; `variant`, see `match`; `reused` and `computed`, the positions of the last call that
    were found in the cache and that were not; `wanted`, positions that texts are likely to be rewound to, of which
    recurrent layers keep a snapshot when they pass them.
    """

    def __init__(
        self,
        owner: object | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = MIN_CAPACITY,
        max_length: int | None = None,
    ) -> None:
        self.owner, self.dtype, self.capacity = owner, dtype, capacity
        self.max_length = sys.maxsize if max_length is None else max_length
        self.states: list[State] = []
        self.wanted: set[int] = set()
        self.length = self.variant = self.reused = self.computed = 0
        self._tokens = torch.empty(0, 0, dtype=torch.int64)  # (B, capacity)
        self._reserved: tuple[KeyValues, ...] = ()
        self._reserved_end = 0

    @property
    def tokens(self) -> Tensor:
        """The ids that the cached positions were computed from, (B, length) int64."""
        return self._tokens[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, spare capacity included."""
        return sum(state.nbytes for state in self.states)

    @property
    def nbytes_held(self) -> int:
        """Bytes that a step reads: no spare capacity, and no snapshots."""
        return sum(state.nbytes_read(self.length) for state in self.states)

    def held(self) -> tuple[Held, ...]:
        """Return views of what each layer keeps, without spare capacity."""
        return tuple(state.held(self.length) for state in self.states)

    def restore(self, tokens: Tensor, layers: Iterable[Mapping[str, Tensor]], variant: int) -> None:
        """Fill the cache with a copy of the tensors of what `held` returned, computed from `tokens`, (B, length).

        `states` must hold the model's empty states. Raises CacheError if a layer does not fit them.
        """
        length = tokens.shape[1]
        self.expect(length)
        for state, held in zip(self.states, layers, strict=True):  # lazily: layers may be read from a file one by one
            state.restore(held, length, self.capacity)
        self._tokens, self.length, self.variant, self._reserved = tokens, length, variant, ()

    def match(self, ids: Tensor, variant: int = 0, min_new: int = 1) -> Tensor:
        """Rewind to the longest prefix shared with `ids` and return the ids after it.

        ids: the whole sequence, (B, n) int64, n >= 1. Returns (B, n - reused). The last `min_new` positions are always
        left to compute, since the caller wants their logits. Rows of a batch share one length, so the prefix ends where
        the first row differs; it is shorter if a state cannot be rewound that far.
        variant: which rotation the keys have (LongRoPE); a cache of a different variant is not reused.
        """
        same = self.shared(ids, variant, min_new)
        length = self.reach(same)
        if same > length:
            self.wanted.add(same)  # an edit is often followed by one at the same place
        if length == 0:
            self.reset()
            self._tokens, self.variant = ids.new_empty(ids.shape[0], 0), variant
        elif length < self.length:
            self.trim(length)
        self.reused, self.computed = length, ids.shape[1] - length
        return ids[:, length:]

    def shared(self, ids: Tensor, variant: int = 0, min_new: int = 1) -> int:
        """Return how many of its positions a sequence, (B, n), shares, whether or not they can be gone back to."""
        if variant != self.variant or ids.shape[0] != self._tokens.shape[0]:
            return 0
        limit = min(self.length, ids.shape[1] - min_new)
        return _common_prefix(self._tokens, ids, limit)

    def expect(self, length: int) -> None:
        """Set the capacity for a sequence of `length` and some more steps, used when buffers next grow."""
        if length > self.capacity:
            self.capacity = length + length // 8

    def append(self, mixer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of one mixer, (B, H_kv, T, D); return what they attend to, as `State.append` does.

        They become part of the cache at `advance`, so an interrupted forward pass leaves the cache as it was.
        """
        self._reserved, state = (), self.states[mixer]
        assert isinstance(state, FullState)
        return state.append(keys, values, self.length, self.capacity, self.max_length)

    def read(self, mixer: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return again what `append` returned for the `count` new positions of one mixer, in this pass."""
        state = self.states[mixer]
        assert isinstance(state, FullState)
        return state.read(self.length, count, dtype)

    def recur(self, mixer: int, core: Core, inputs: Parts) -> Tensor:
        """Run the recurrence of one mixer over new positions, (B, T, ...) each: (B, T, D).

        Its state counts from `advance` on, as with `append`.
        """
        state = self.states[mixer]
        assert isinstance(state, RecurrentState)
        return state.run(core, inputs, self.length, self.wanted)

    def reserve(self, count: int) -> tuple[KeyValues, ...]:
        """Make room for `count` new positions in all layers of attention; the caller fills it in, then calls `advance`.

        Returns the same object as before while no buffer moves.
        """
        if self._reserved and self.length + count <= self._reserved_end:
            return self._reserved
        states = [state for state in self.states if isinstance(state, FullState)]
        reserved = tuple(state.reserve(self.length, count, self.capacity, self.max_length) for state in states)
        self._reserved = () if any(state.moving for state in states) else reserved
        self._reserved_end = min((buffers.end for buffers in reserved), default=0)
        return reserved

    def reserve_states(self, count: int) -> tuple[list[int], list[list[Parts]]]:
        """Make room for the states of all recurrent layers in a pass over `count` positions; the caller fills it in.

        Returns after how many of them there is one, and for each layer the state before them, to read, and those.
        """
        states = [state for state in self.states if isinstance(state, RecurrentState)]
        if not states:
            return [], []
        ends = snapshot_ends(self.length, self.length + count, self.wanted)
        return [end - self.length for end in ends], [state.reserve(self.length, ends, self.wanted) for state in states]

    def advance(self, ids: Tensor) -> None:
        """Count the positions that every layer has stored. ids: their tokens, (B, T) int64."""
        end = self.length + ids.shape[1]
        if self.length == 0:
            self._tokens = ids.new_empty(ids.shape[0], 0)
        if end > self._tokens.shape[1]:
            self._tokens = grow(self._tokens, max(end, 2 * self._tokens.shape[1], self.capacity), self.length, dim=1)
        self._tokens.narrow(1, self.length, ids.shape[1]).copy_(ids)  # a slice takes longer than the copy
        self.length = end
        for state in self.states:
            state.commit()
        self.wanted = {position for position in self.wanted if position > end}

    def branch(self, length: int, capacity: int, max_length: int | None = None) -> KVCache:
        """Copy the first `length` positions into a new cache. Raises CacheError as `trim` does."""
        self._check_trim(length)
        other = KVCache(self.owner, self.dtype, capacity, max_length)
        if length:
            other._tokens, other.length, other.variant = self._tokens[:, :length].clone(), length, self.variant
            other.states = [state.branch(length, capacity) for state in self.states]
        return other

    def trim(self, length: int) -> None:
        """Keep the first `length` positions. Raises CacheError if fewer are cached or a state cannot be rewound."""
        self._check_trim(length)
        if length == 0:
            self.reset()
        self.length = length

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self.length = 0
        self._tokens = torch.empty(0, 0, dtype=torch.int64)
        self.states, self._reserved = [], ()

    def _check_trim(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise CacheError(f"cannot trim a cache of {self.length} positions to {length}")
        if self.reach(length) != length:
            raise CacheError(
                f"cannot trim to {length} positions: the sliding window no longer holds the keys, "
                "or a recurrent layer has no snapshot there"
            )

    def reach(self, length: int) -> int:
        """Return the longest length, at most `length`, that every state can be rewound to."""
        while length < self.length and (reached := min(state.reach(length) for state in self.states)) < length:
            length = reached
        return length


def new_states(
    config: DecoderConfig, batch: int, kv_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> list[State]:
    """Create the states of an empty cache. kv_dtype: of stored keys and values. dtype: of the computation."""
    most = max_snapshots(batch * snapshot_bytes(config, dtype))

    def new_state(mixer: Mixer) -> State:
        if not isinstance(mixer, Recurrent):
            return attention_state(mixer, batch, kv_dtype, device)
        shapes = [(batch, *shape) for shape in mixer.state_shapes]
        wide = torch.promote_types(dtype, torch.float32)
        return RecurrentState(tuple(torch.zeros(shape, dtype=wide, device=device) for shape in shapes), most)

    return [new_state(mixer) for mixer in config.mixers]


def cache_bytes(config: DecoderConfig, positions: int, dtype: torch.dtype = torch.float32) -> int:
    """The most bytes of a cache that holds `positions`, without spare capacity. dtype: of stored keys and values."""
    snapshot = snapshot_bytes(config, dtype)
    keys_and_values = sum(
        _position_bytes(mixer, dtype)
        * (positions if mixer.window is None else window_capacity(mixer.window, positions))
        for mixer in attentions(config)
    )
    return keys_and_values + snapshot * snapshot_count(positions, max_snapshots(snapshot))


def position_bytes(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one position in all layers of attention."""
    return sum(_position_bytes(mixer, dtype) for mixer in attentions(config))


def attentions(config: DecoderConfig) -> list[Attention | LatentAttention]:
    """Return the attentions of all layers that keep keys and values of their own."""
    return [mixer for mixer in config.mixers if not isinstance(mixer, Recurrent)]


def _position_bytes(mixer: Attention | LatentAttention, dtype: torch.dtype) -> int:
    heads, *widths = mixer.stored
    return heads * sum(row_length(width, dtype) for width in widths) * dtype.itemsize


def snapshot_bytes(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the states of all recurrent layers after one position: in fp32 or wider, for one sequence."""
    numbers = sum(math.prod(shape) for mixer in config.recurrences for shape in mixer.state_shapes)
    return numbers * max(dtype.itemsize, torch.float32.itemsize)


def _common_prefix(a: Tensor, b: Tensor, limit: int) -> int:
    """Length of the longest prefix of at most `limit` that two (B, n) tensors share in every row."""
    # By numpy, whose calls cost a fifth of torch's: a server compares each prompt with hundreds of caches.
    differ = (a.cpu().numpy()[:, :limit] != b.cpu().numpy()[:, :limit]).any(axis=0)
    first = int(differ.argmax()) if limit else 0  # 0 if none differs
    return first if limit and differ[first] else limit
