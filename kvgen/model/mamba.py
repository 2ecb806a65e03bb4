"""Mamba: a selective state space model (Gu and Dao 2023, arXiv:2312.00752), in its letters."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Linear, RMSNorm
from kvgen.model.mamba2 import Vector
from kvgen.model.mixers import Mamba
from kvgen.model.recurrent import Parts
from kvgen.model.short_conv import DepthwiseConv
from kvgen.model.spans import Pass

_CHUNK = 8  # positions whose states are in memory at once


class MambaModule(nn.Module):
    """The module of `mixers.Mamba`: out_proj(ssm(silu(conv(x))) * silu(z)).

    dt, B and C are projections of the convolved x, each with a norm (arXiv:2403.19887, section 3). The state is
    the last inputs of the convolution, and the state of the channels, (D, N).
    """

    def __init__(self, spec: Mamba, config: DecoderConfig, state: int, name: str = "attn") -> None:
        super().__init__()
        self.spec, self.state = spec, state
        biases, eps = config.biases, config.norm_eps
        self.in_proj = Linear(config.dim, 2 * spec.inner, bias=f"{name}.in_proj" in biases)
        self.conv = DepthwiseConv(spec.inner, spec.width, bias=f"{name}.conv" in biases)
        self.x_proj = Linear(spec.inner, spec.rank + 2 * spec.size)
        self.dt_norm = RMSNorm((spec.rank,), eps)
        self.b_norm, self.c_norm = RMSNorm((spec.size,), eps), RMSNorm((spec.size,), eps)
        self.dt_proj = Linear(spec.rank, spec.inner, bias=True)
        self.A = Vector(spec.inner, spec.size)
        self.D = Vector(spec.inner)
        self.out_proj = Linear(spec.inner, config.dim, bias=f"{name}.out_proj" in biases)

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (rows, D) each
        out: Tensor = self.out_proj(batch.recur(self.state, self._mix, u) * F.silu(z))
        return out

    def _mix(self, inputs: Parts, state: Parts) -> tuple[Tensor, Parts]:
        """inputs: (B, T, D)."""
        spec = self.spec
        conv, last = self.conv(inputs[0], state[0])
        x = F.silu(conv)
        dt, b, c = self.x_proj(x).tensor_split([spec.rank, spec.rank + spec.size], dim=-1)
        dt, b, c = self.dt_proj(self.dt_norm(dt)), self.b_norm(b), self.c_norm(c)  # (B, T, D), (B, T, N) twice
        wide, dt, b, c = (part.to(state[1].dtype) for part in (x, dt, b, c))
        y, channels = scan(wide, F.softplus(dt), self.A.weight.to(wide.dtype), b, c, state[1])
        y = y + wide * self.D.weight.to(wide.dtype)
        return y.to(x.dtype), (last, channels)


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t, y_t = C_t h_t, position by position (section 3.2 of the paper).

    x, dt: (B, T, D). a: (D, N). b, c: (B, T, N). state: h before the first position, (B, D, N). Returns y, (B, T, D),
    and the last h. As each channel has decays of its own, to multiply positions with each other, as `mamba2.scan` does,
    would take T times as much memory and arithmetic; a step is one operation here.
    """
    outputs = []
    for start in range(0, x.shape[1], _CHUNK):
        x_, dt_, b_, c_ = (part[:, start : start + _CHUNK] for part in (x, dt, b, c))
        decays = (dt_[..., None] * a).exp()  # (B, T, D, N)
        written = (dt_ * x_)[..., None] * b_[:, :, None]  # (B, T, D, N)
        states = []
        for decay, new in zip(decays.unbind(1), written.unbind(1), strict=True):
            state = torch.addcmul(new, decay, state)
            states.append(state)
        outputs.append((torch.stack(states, dim=1) @ c_[..., None]).squeeze(-1))
    return torch.cat(outputs, dim=1), state
