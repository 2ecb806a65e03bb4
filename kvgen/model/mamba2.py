"""Mamba 2: a state space model with one decay a head (Dao and Gu 2024, arXiv:2405.21060), in its letters."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Linear, rms_normed
from kvgen.model.mixers import Mamba2
from kvgen.model.recurrent import Parts
from kvgen.model.short_conv import DepthwiseConv
from kvgen.model.spans import Pass

_CHUNK = 64  # positions; within a chunk they are multiplied with each other, from chunk to chunk goes the state


class Mamba2Module(nn.Module):
    """The module of `mixers.Mamba2`: out_proj(norm(ssm(silu(conv(x, B, C)), dt) * silu(z))).

    Or out_proj(norm(ssm(...)) * silu(z)), or without a norm. The state is the last inputs of the convolution, and the
    state of the heads, (H, D, N).
    """

    def __init__(self, spec: Mamba2, config: DecoderConfig, state: int, name: str = "attn") -> None:
        super().__init__()
        self.spec, self.state = spec, state
        biases = config.biases
        self.in_proj = Linear(config.dim, spec.inner + spec.convolved + spec.heads, bias=f"{name}.in_proj" in biases)
        self.conv = DepthwiseConv(spec.convolved, spec.width, bias=f"{name}.conv" in biases)
        self.dt = Vector(spec.heads)
        self.A = Vector(spec.heads)
        self.D = Vector(spec.heads)
        self.norm = nn.Identity() if spec.norm is None else GroupNorm(spec.inner, spec.groups, config.norm_eps)
        self.out_proj = Linear(spec.inner, config.dim, bias=f"{name}.out_proj" in biases)

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        spec = self.spec
        z, conv, dt = self.in_proj(x).tensor_split([spec.inner, spec.inner + spec.convolved], dim=-1)
        y, gate = batch.recur(self.state, self._mix, conv, dt), F.silu(z)  # (rows, inner)
        out: Tensor = self.out_proj(self.norm(y) * gate if spec.norm == "before-gate" else self.norm(y * gate))
        return out

    def _mix(self, inputs: Parts, state: Parts) -> tuple[Tensor, Parts]:
        """inputs: (B, T, convolved), (B, T, H)."""
        spec, (conv, dt) = self.spec, inputs
        conv, last = self.conv(conv, state[0])
        wide = F.silu(conv).to(state[1].dtype)
        shape = wide.shape[:2]
        x = wide[..., : spec.inner].reshape(*shape, spec.heads, spec.head_dim)  # (B, T, H, D)
        b, c = wide[..., spec.inner :].reshape(*shape, 2, spec.groups, spec.size).unbind(2)  # (B, T, G, N)
        dt = F.softplus((dt + self.dt.weight).to(x.dtype)).clamp(*spec.dt_limit)  # (B, T, H)
        y, heads = scan(x * dt[..., None], dt * self.A.weight.to(x.dtype), b, c, state[1])
        y = y + x * self.D.weight.to(x.dtype)[:, None]
        return y.flatten(2).to(conv.dtype), (last, heads)


def scan(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run h_t = a_t h_(t-1) + x_t b_t, y_t = c_t h_t over positions, in chunks (section 6 of the paper).

    x: (B, T, H, D). log_a: the logarithms of the decays, (B, T, H). b, c: (B, T, G, N); H / G heads share a group.
    state: h before the first position, (B, H, D, N). Returns y, (B, T, H, D), and the last h.
    """
    share = x.shape[2] // b.shape[2]
    outputs = []
    for start in range(0, x.shape[1], _CHUNK):
        x_, log_a_, b_, c_ = (part[:, start : start + _CHUNK] for part in (x, log_a, b, c))
        b_, c_ = (part.repeat_interleave(share, dim=2).transpose(1, 2) for part in (b_, c_))  # (B, H, T, N)
        x_, log_a_ = x_.transpose(1, 2), log_a_.transpose(1, 2)  # (B, H, T, D), (B, H, T)
        decay = segment_sums(log_a_).exp()  # (B, H, T, T): a_(s+1) ... a_t
        within = (c_ @ b_.transpose(-1, -2) * decay).tril() @ x_  # (B, H, T, D)
        since = log_a_.cumsum(-1).exp()[..., None]  # (B, H, T, 1): a_1 ... a_t
        outputs.append((within + since * (c_ @ state.transpose(-1, -2))).transpose(1, 2))
        state = since[..., -1:, :] * state + (x_ * decay[..., -1, :, None]).transpose(-1, -2) @ b_
    return torch.cat(outputs, dim=1), state


def segment_sums(x: Tensor) -> Tensor:
    """Return x_(s+1) + ... + x_t for each t >= s, (..., T) to (..., T, T); more exact than a difference of sums."""
    count = x.shape[-1]
    return x[..., None].expand(*x.shape, count).tril(-1).cumsum(-2)


class Vector(nn.Module):
    """A parameter of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class GroupNorm(nn.Module):
    """RMSNorm of each of some groups of neighbours, computed in fp32 or wider."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normed(x.view(*x.shape[:-1], self.groups, -1), self.eps).flatten(-2) * self.weight
