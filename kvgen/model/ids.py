"""What token ids have to be before anything is computed of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvgen.errors import UsageError


def check_form(ids: Tensor) -> None:
    """Raises UsageError for what is no (B, n) int64 tensor of at least one token."""
    if not isinstance(ids, Tensor):
        raise UsageError(f"token ids must be an int64 tensor, (batch, n), not {type(ids).__name__}")
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise UsageError(
            f"token ids must be an int64 tensor, (batch, n), not {str(ids.dtype)[6:]} of shape {tuple(ids.shape)}"
        )
    if ids.numel() == 0:
        raise UsageError("cannot decode an empty sequence: give at least one token")


def check_range(ids: Tensor, vocabulary: int) -> None:
    """Raises UsageError for an id outside the vocabulary."""
    least, most = (int(end) for end in ids.aminmax())
    if least < 0 or most >= vocabulary:
        outside = least if least < 0 else most
        raise UsageError(f"token id {outside} is outside the model's vocabulary of {vocabulary}")
