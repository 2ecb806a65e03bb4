"""A file in memory: its tensors are views, and pages that were read can be let go of again."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from kvgen.errors import CheckpointError


class MappedFile:
    """A file that is mapped, not read. Raises CheckpointError if it cannot be."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                # A private copy-on-write map: nothing is copied until written, and torch gets writable memory.
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped ({error})") from error

    def tensor(self, dtype: torch.dtype, count: int, offset: int) -> Tensor:
        """`count` numbers from byte `offset`, a view."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype, count=count, offset=offset)

    def release(self, offset: int, size: int) -> None:
        """Give back the memory of `size` bytes from `offset`. Who looks at them again reads the file again."""
        if hasattr(self.data, "madvise"):  # not on Windows
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.data.madvise(mmap.MADV_DONTNEED, first, min(offset + size, len(self.data)) - first)
