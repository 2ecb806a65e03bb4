"""What does not look at other positions: linear layers, embedding, norms, MLP, the rotary rotation.

Parameters are left empty: they come from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.config import MLP, DecoderConfig, Rotary


class Linear(nn.Module):
    """x W^T + b. Unlike torch's own it does not initialize, which on the meta device costs a second of imports."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """The rows of a table, by token id."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in fp32 or wider."""

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., *shape). The mean is over its last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, shape: tuple[int, ...], eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., *shape). Mean and variance are over its last dimension."""
        if self.weight.ndim == 1:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        normed = F.layer_norm(x, self.weight.shape[-1:], eps=self.eps) * self.weight
        return normed if self.bias is None else normed + self.bias


class L2Norm(nn.Module):
    """Unit vectors, scaled or not."""

    def __init__(self, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.weight = None if shape is None else nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D). The length is over its last dimension."""
        unit = F.normalize(x, dim=-1)
        return unit if self.weight is None else unit * self.weight


def make_norm(kind: str, shape: tuple[int, ...], eps: float, bias: bool) -> nn.Module:
    """The norm that a config names. An RMS norm has no bias, whatever `bias` says."""
    return RMSNorm(shape, eps) if kind == "rms" else LayerNorm(shape, eps, bias)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class MLPModule(nn.Module):
    """`kvgen.model.config.MLP`."""

    def __init__(self, spec: MLP, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        dim, biases = config.dim, config.biases
        self.gate = Linear(dim, spec.width, bias="ffn.gate" in biases) if spec.gated else None
        self.up = Linear(dim, spec.width, bias="ffn.up" in biases)
        self.down = Linear(spec.width, dim, bias="ffn.down" in biases)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        out: Tensor = self.down(hidden)
        return out


class RotaryTables(nn.Module):
    """Cosines and sines of positions, for `rotate`."""

    frequencies: Tensor
    long_frequencies: Tensor

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.scale = rotary.scale
        # On the CPU even while the parameters are built on the meta device: they are not in a checkpoint.
        for name, values in (
            ("frequencies", rotary.inverse_frequencies),
            ("long_frequencies", rotary.long_frequencies),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device="cpu"), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        """Follow the module to another device, but never to fewer bits than float32's: positions need them."""
        before = self.frequencies, self.long_frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.frequencies.device
        if torch.finfo(self.frequencies.dtype).bits < 32:
            self.frequencies, self.long_frequencies = (tensor.to(device) for tensor in before)
        return self

    def forward(self, positions: Tensor, long: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tables for positions, (rows,) int64: two (rows, 2 * pairs) tensors of the frequencies' dtype.

        long: (rows,) bool, whether a row belongs to a sequence that is longer than the rotation's short length; None
        if none does.
        """
        frequencies = self.frequencies
        if long is not None:
            frequencies = torch.where(long[:, None], self.long_frequencies, frequencies)
        angles = positions[:, None].to(frequencies.dtype) * frequencies  # (rows, pairs)
        angles = torch.cat((angles, angles), dim=-1)  # (rows, 2 * pairs)
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + R / 2) of the first R dimensions of the heads in x, (rows, H, D), by the angles of
    their positions. cos, sin: (rows, 1, R)."""
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
