"""A gated causal convolution over a few positions (Liquid AI 2025, arXiv:2511.23404)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Linear
from kvgen.model.mixers import ShortConv
from kvgen.model.recurrent import Parts
from kvgen.model.spans import Pass


class ShortConvModule(nn.Module):
    """The module of `mixers.ShortConv`: (b, c, x) = in_proj(x); out_proj(c * conv(b * x)).

    The state is the last width - 1 inputs of the convolution. Sums are in one order, however a text is split.
    """

    def __init__(self, spec: ShortConv, config: DecoderConfig, state: int, name: str = "attn") -> None:
        super().__init__()
        self.spec, self.state = spec, state
        biases = config.biases
        self.in_proj = Linear(config.dim, 3 * spec.channels, bias=f"{name}.in_proj" in biases)
        self.conv = DepthwiseConv(spec.channels, spec.width, bias=f"{name}.conv" in biases)
        self.out_proj = Linear(spec.channels, config.dim, bias=f"{name}.out_proj" in biases)

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        before, after, x = self.in_proj(x).chunk(3, dim=-1)  # (rows, C) each
        out: Tensor = self.out_proj(after * batch.recur(self.state, self._convolve, before * x))
        return out

    def _convolve(self, inputs: Parts, state: Parts) -> tuple[Tensor, Parts]:
        """inputs: (B, T, C)."""
        output, last = self.conv(inputs[0], state[0])
        return output, (last,)


class DepthwiseConv(nn.Module):
    """A causal convolution of each channel alone, which continues from the last inputs."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """x: new inputs, (B, T, C). before: the width - 1 inputs before them. Returns outputs, and the last inputs."""
        new, width = x.shape[1], self.weight.shape[1]
        read = torch.cat((before.to(x.dtype), x), dim=1)  # (B, width - 1 + T, C)
        out = read[:, :new] * self.weight[:, 0]
        for i in range(1, width):
            out = out + read[:, i : i + new] * self.weight[:, i]
        return out if self.bias is None else out + self.bias, read[:, new:].to(before.dtype, copy=True)
