"""Run a module in a wider dtype without copying all of its weights."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

M = TypeVar("M", bound=nn.Module)


def widened(module: M, dtype: torch.dtype) -> M:
    """Copy a module that shares its weights with the original and converts each to `dtype` while it is used.

    Extra memory: one converted weight at a time. Buffers, which are small, are converted at once. Raises whatever
    copying the module raises.
    """
    shared = {id(parameter): parameter for parameter in module.parameters()}
    wide = copy.deepcopy(module, dict(shared))
    for part in list(wide.modules()):
        if isinstance(part, _Converted):
            part.dtype = dtype  # the original is such a copy itself
        if isinstance(part, parametrize.ParametrizationList):
            continue
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_floating_point():
                parametrize.register_parametrization(part, name, _Converted(dtype), unsafe=True)
    return wide


class _Converted(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)
