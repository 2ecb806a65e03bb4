"""Sizes of tiles, and dtypes in Triton."""

from __future__ import annotations

import torch
import triton.language as tl

_MAX_CHUNK = 2048  # inputs

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return _DTYPES[dtype]


def matvec_sizes(inputs: int) -> tuple[int, int, int]:
    """Return ROWS and CHUNK of `matvec`, and its warps."""
    return 4, min(_MAX_CHUNK, padded(inputs)), 4
