"""Checks of token ids before a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgen.errors import UsageError


def check_form(ids: Tensor) -> None:
    """Raises UsageError unless `ids` is a (B, n) int64 tensor with at least one token."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2:
        tensor = isinstance(ids, Tensor)
        found = f"{str(ids.dtype)[6:]} of shape {tuple(ids.shape)}" if tensor else type(ids).__name__
        raise UsageError(f"token ids must be an int64 tensor, (batch, n), not {found}")
    if ids.numel() == 0:
        raise UsageError("cannot decode an empty sequence: give at least one token")


def check_range(ids: Tensor, vocab_size: int) -> None:
    """Raises UsageError if an id is outside the vocabulary."""
    for extreme in (int(ids),) if ids.numel() == 1 else map(int, ids.aminmax()):
        if not 0 <= extreme < vocab_size:
            raise UsageError(f"token id {extreme} is outside the model's vocabulary of {vocab_size}")
