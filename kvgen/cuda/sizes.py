"""Sizes of tiles, and dtypes in Triton."""

from __future__ import annotations

import torch
import triton.language as tl

_MANY = 32768  # outputs, of a head
_LONG = 4096  # inputs

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return _DTYPES[dtype]


def matvec_sizes(outputs: int, inputs: int, gated: bool) -> tuple[int, int]:
    """Return ROWS and CHUNK of `matvec`, with four warps: the fastest of those measured on an H100 in bf16.

    They share the outputs of a step among all processors, and keep enough loads in flight on each.
    """
    if outputs >= _MANY:
        rows, chunk = 4, 2048
    else:
        rows, chunk = (8, 2048) if inputs > _LONG else (4, 1024)
    return rows // 2 if gated else rows, min(chunk, padded(inputs))
