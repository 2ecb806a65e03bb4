"""Memory for weights, on huge pages where Linux has them.

A step reads all weights once. On pages of 4 KB the processor would look up the address of each page, which takes as
long as reading a part of it.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 1 << 21  # bytes of a huge page
_MAPPING = 1 << 28  # bytes; only pages that are written to take memory
_ALIGNMENT = 64


class WeightMemory:
    """Memory for the weights of one model, next to each other: most matrices are smaller than a huge page.

    It is freed when none of its tensors is left. Threads may share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        self._next = self._end = 0  # bytes of the mapping: the first that is free, and their end

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor."""
        count = math.prod(shape)
        if sys.platform != "linux" or not count:
            return torch.empty(*shape, dtype=dtype)
        nbytes = count * dtype.itemsize
        with self._lock:
            if self._mapping is None or self._next + nbytes > self._end:
                self._mapping = self._map(nbytes)
            tensor = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=self._next)
            self._next += nbytes + -nbytes % _ALIGNMENT
        return tensor.view(*shape)

    def _map(self, nbytes: int) -> mmap.mmap:
        self._end = max(nbytes, _MAPPING) + _PAGE
        mapping = mmap.mmap(-1, self._end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self._next = -torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr() % _PAGE
        return mapping
