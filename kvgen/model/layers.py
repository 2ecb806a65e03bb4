"""What does not look at other positions: linear layers, embedding, norm, gated MLP, the rotary rotation.

Parameters are left empty: they come from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig, Rotary


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

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim, bias="ffn.gate" in config.biases)
        self.up = Linear(config.dim, config.ffn_dim, bias="ffn.up" in config.biases)
        self.down = Linear(config.ffn_dim, config.dim, bias="ffn.down" in config.biases)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class RotaryTables(nn.Module):
    """Cosines and sines of a run of positions, for `rotate`."""

    inverse_frequencies: Tensor

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.scale = rotary.scale
        # On the CPU even while the parameters are built on the meta device: it is not in a checkpoint.
        frequencies = torch.tensor(rotary.inverse_frequencies, dtype=torch.float32, device="cpu")
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        """Follow the module to another device, but never to fewer bits than float32's: positions need them."""
        frequencies = self.inverse_frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.inverse_frequencies.dtype).bits < 32:
            self.inverse_frequencies = frequencies.to(self.inverse_frequencies.device)
        return self

    def forward(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Tables for positions start to start + count - 1: two (count, D) tensors of the frequencies' dtype."""
        frequencies = self.inverse_frequencies
        positions = torch.arange(start, start + count, device=frequencies.device, dtype=frequencies.dtype)
        angles = torch.outer(positions, frequencies)  # (T, D / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, D)
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D / 2) of the heads in x, (B, H, T, D), by the angles of their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
