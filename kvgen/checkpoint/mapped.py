"""Memory-mapped files, whose tensors are views."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from kvgen.errors import CheckpointError

_AROUND = 1 << 21  # systems map up to that many bytes around an access; where tensors are small, they add up


class MappedFile:
    """A memory-mapped file. Raises CheckpointError if it cannot be mapped."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                # Copy-on-write, because torch wants writable memory
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error

    def tensor(self, dtype: torch.dtype, count: int, offset: int) -> Tensor:
        """Return a view of `count` numbers from byte `offset`."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype, count=count, offset=offset)

    def release(self, offset: int, size: int) -> None:
        """Drop the pages of `size` bytes from `offset`; the next access reads the file again."""
        if hasattr(self.data, "madvise"):  # not on Windows
            first = max(0, offset - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, first, min(offset + size + _AROUND, len(self.data)) - first)
