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
        self._tokens = torch.empty(0, 0, dtype=torch.int64)  # (B, capacity)
        self._keys: list[Tensor] = []  # one (B, H_kv, capacity, D) for each layer
        self._values: list[Tensor] = []

    @property
    def length(self) -> int:
        """Number of positions that are cached."""
        return self._length

    @property
    def tokens(self) -> Tensor:
        """The ids that the cached positions were computed from, (B, length) int64."""
        return self._tokens[:, : self._length]

    def match(self, ids: Tensor) -> Tensor:
        """Trim the cache to the longest prefix that it shares with `ids` and return the ids after it.

        ids: the whole sequence, (B, n) int64, n >= 1. The result is (B, n - reused); at least one position is
        always left to compute, since its logits are what the caller wants. Rows of a batch share one length, so
        the prefix ends where the first row differs.
        """
        batch, n = ids.shape
        if batch != self._tokens.shape[0]:
            self.reset()
            self._tokens = ids.new_empty(batch, 0)
        limit = min(self._length, n - 1)
        self.trim(_common_prefix(self._tokens[:, :limit], ids[:, :limit]))
        self.reused = self._length
        self.computed = n - self._length
        return ids[:, self._length :]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; return that layer's keys and values up to and with them.

        keys, values: (B, H_kv, T, D). Returns two (B, H_kv, length + T, D) views. The new positions do not
        count until `advance`, so a forward pass that is interrupted leaves the cache as it was.
        """
        if layer == len(self._keys):
            self._keys.append(keys.new_empty(*keys.shape[:2], 0, keys.shape[3]))
            self._values.append(values.new_empty(*values.shape[:2], 0, values.shape[3]))
        end = self._length + keys.shape[2]
        self._keys[layer] = stored_keys = _grow(self._keys[layer], end, self._length, dim=2)
        self._values[layer] = stored_values = _grow(self._values[layer], end, self._length, dim=2)
        stored_keys[:, :, self._length : end] = keys
        stored_values[:, :, self._length : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def advance(self, ids: Tensor) -> None:
        """Count the positions that every layer has appended: `ids`, (B, T) int64, are their token ids."""
        end = self._length + ids.shape[1]
        if self._length == 0:
            self._tokens = ids.new_empty(ids.shape[0], 0)
        self._tokens = _grow(self._tokens, end, self._length, dim=1)
        self._tokens[:, self._length : end] = ids
        self._length = end

    def trim(self, length: int) -> None:
        """Keep the first `length` positions and forget the rest.

        Raises CacheError if fewer are cached.
        """
        if not 0 <= length <= self._length:
            raise CacheError(f"cannot trim a cache of {self._length} positions to {length}")
        self._length = length

    def reset(self) -> None:
        """Forget everything and release the memory."""
        self._length = 0
        self._tokens = torch.empty(0, 0, dtype=torch.int64)
        self._keys.clear()
        self._values.clear()


def _common_prefix(a: Tensor, b: Tensor) -> int:
    """Length of the longest prefix that two (B, n) tensors share in every row."""
    if torch.equal(a, b):  # the case of every decoding step, and the cheap one
        return a.shape[1]
    return int((a != b).any(dim=0).nonzero()[0, 0])


def _grow(buffer: Tensor, needed: int, used: int, dim: int) -> Tensor:
    """`buffer` if it holds `needed` entries along `dim`, else one of twice the size with the `used` ones in it.

    Doubling makes the copies a constant cost per position, so no step copies the whole past.
    """
    if needed <= buffer.shape[dim]:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = max(needed, 2 * buffer.shape[dim], _MIN_CAPACITY)
    grown = buffer.new_empty(shape)
    grown.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return grown
