"""Layers that treat each position alone: linear, embedding, norms, MLP, rotary embedding.

Parameters are left uninitialized; a checkpoint fills them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.ffns import MLP, XIELU, Activation, ClampedSwiGLU
from kvgen.model.mixers import Rotary


class Linear(nn.Module):
    """x W^T + b. torch's own class initializes, which costs a second of imports on the meta device."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in fp32 or wider."""

    def __init__(self, shape: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., *shape), normalized over the last dimension."""
        return rms_normed(x, self.eps) * self.weight


def rms_normed(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight, over the last dimension."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, shape: tuple[int, ...], eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., *shape), normalized over the last dimension."""
        if self.weight.ndim == 1:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        normed = F.layer_norm(x, self.weight.shape[-1:], eps=self.eps) * self.weight
        return normed if self.bias is None else normed + self.bias


def make_norm(kind: str, shape: tuple[int, ...], eps: float, bias: bool) -> nn.Module:
    """Create the norm `kind`. An RMSNorm ignores `bias`."""
    return RMSNorm(shape, eps) if kind == "rms" else LayerNorm(shape, eps, bias)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def make_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    return partial(xielu, spec=activation) if isinstance(activation, XIELU) else ACTIVATIONS[activation]


def xielu(x: Tensor, spec: XIELU) -> Tensor:
    """See `ffns.XIELU`."""
    below = spec.negative * (torch.expm1(x.clamp(max=spec.limit)) - x)
    return torch.where(x > 0, spec.positive * x * x, below) + spec.linear * x


class MLPModule(nn.Module):
    """The module of `ffns.MLP`. name: its own, inside a block, for `DecoderConfig.biases`."""

    def __init__(self, spec: MLP, config: DecoderConfig, name: str = "ffn") -> None:
        super().__init__()
        self.spec = spec
        dim, biases = config.dim, config.biases
        self.gate = Linear(dim, spec.width, bias=f"{name}.gate" in biases) if spec.gated else None
        self.up = Linear(dim, spec.width, bias=f"{name}.up" in biases)
        self.down = Linear(spec.width, dim, bias=f"{name}.down" in biases)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(combine(self.spec, None if self.gate is None else self.gate(x), self.up(x)))
        return out


def combine(spec: MLP, gate: Tensor | None, up: Tensor) -> Tensor:
    """Return the hidden layer of an MLP from its projections. gate: None if it is not gated."""
    if isinstance(spec.activation, ClampedSwiGLU):
        assert gate is not None
        return clamped_swiglu(gate, up, spec.activation)
    activation = make_activation(spec.activation)
    return activation(up) if gate is None else activation(gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor, spec: ClampedSwiGLU) -> Tensor:
    """See `ffns.ClampedSwiGLU`."""
    gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    return gate * torch.sigmoid(spec.alpha * gate) * (up + 1)


class RotaryTables(nn.Module):
    """Computes cosines and sines for `rotate`."""

    frequencies: Tensor
    long_frequencies: Tensor

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.scale, self.growth, self.growth_length = rotary.scale, rotary.growth, rotary.growth_length
        # On the CPU even if parameters are on the meta device, since a checkpoint does not hold them.
        short, long = (
            torch.tensor(values, dtype=torch.float32, device="cpu")
            for values in (rotary.inverse_frequencies, rotary.long_frequencies)
        )
        self.register_buffer("frequencies", short, persistent=False)
        self.register_buffer("long_frequencies", long, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        """Move to a new device or a wider dtype, but keep float32 in narrower modules: positions need it."""
        before = self.frequencies, self.long_frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.frequencies.device
        if torch.finfo(self.frequencies.dtype).bits < 32:
            self.frequencies, self.long_frequencies = (tensor.to(device) for tensor in before)
        return self

    def forward(self, positions: Tensor, long: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions, (rows,) int64: (rows, 2 * pairs) each, in the frequencies' dtype.

        long: (rows,) bool, whether a row uses the long frequencies; None if none does.
        """
        frequencies = self.frequencies
        if long is not None:
            frequencies = torch.where(long[:, None], self.long_frequencies, frequencies)
        angles = positions[:, None].to(frequencies.dtype) * frequencies  # (rows, pairs)
        angles = torch.cat((angles, angles), dim=-1)  # (rows, 2 * pairs)
        scale: float | Tensor = self.scale
        if self.growth:
            steps = (positions // self.growth_length)[:, None].to(frequencies.dtype)  # (rows, 1)
            scale = scale * (1 + self.growth * _exactly(torch.log1p, steps))
        return _exactly(torch.cos, angles) * scale, _exactly(torch.sin, angles) * scale


def _exactly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute in float64 on a CPU: processors differ in a function's last bits, which rounding then hides."""
    return function(x.double()).to(x.dtype) if x.device.type == "cpu" else function(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R / 2) of the first R dimensions of the heads x, (rows, H, D). cos, sin: (rows, 1, R)."""
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
