"""How to run a decoder: precision, device, kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ComputeOptions:
    """How to run a decoder.

    dtype: of the computation; with torch of the weights too.
    kernels: use the C++ kernels, which keep weights in their stored types. required: raise if they lack a mechanism of
        the model, instead of using torch.
    quantize: `auto` keeps stored types; `none` converts integers to floats; `int8` and `int4` quantize floats.
    kv_dtype: of cached keys and values; None for `dtype`.
    activation_bits: of the integers that the kernels round activations to, for integer weights; 16 or 8.
    step_kernels: use the kernels for steps on a GPU, if they have the mechanisms of the model.
    engine: name to show to users.
    """

    dtype: torch.dtype
    device: torch.device
    kernels: bool = False
    quantize: str = "auto"
    kv_dtype: torch.dtype | None = None
    activation_bits: int = 16
    engine: str = "torch"
    required: bool = False
    step_kernels: bool = False

    @property
    def numerics(self) -> str:
        """Everything besides weights and text that logits depend on, as a comparable string."""
        dtype, kv_dtype = (str(kind).removeprefix("torch.") for kind in (self.dtype, self.kv_dtype or self.dtype))
        by = f"kernels int{self.activation_bits}" if self.kernels else self.device.type
        return f"{by} {dtype}, cache {kv_dtype}, weights {self.quantize}"
