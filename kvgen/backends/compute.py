"""How a decoder is to compute: precision, device, kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ComputeOptions:
    """How a decoder is to compute.

    dtype: of the computation; on torch of the weights too.
    kernels: whether to compute on the C++ kernels, where weights stay as they are stored.
    quantize: `auto`, weights as they are stored; `none`, integers as floats; `int8` or `int4`, floats as integers.
    kv_dtype: of cached keys and values; None for `dtype`.
    engine: what it is called.
    """

    dtype: torch.dtype
    device: torch.device
    kernels: bool = False
    quantize: str = "auto"
    kv_dtype: torch.dtype | None = None
    engine: str = "torch"

    @property
    def numerics(self) -> str:
        """What numbers depend on besides weights and text, for people and to compare."""
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.kv_dtype or self.dtype)]
        return (
            f"{'kernels' if self.kernels else self.device.type} {names[0]}, cache {names[1]}, weights {self.quantize}"
        )
