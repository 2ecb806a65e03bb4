"""Gated delta net: linear attention that erases what it overwrites (Yang et al. 2024, arXiv:2412.06464)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Linear, RMSNorm
from kvgen.model.mamba2 import Vector, segment_sums
from kvgen.model.mixers import DeltaNet
from kvgen.model.recurrent import Parts
from kvgen.model.short_conv import DepthwiseConv
from kvgen.model.spans import Pass

_CHUNK = 64  # positions; within a chunk they are multiplied with each other, from chunk to chunk goes the state
_UNIT_EPS = 1e-6  # added to squared lengths, as in flash-linear-attention


class DeltaNetModule(nn.Module):
    """The module of `mixers.DeltaNet`: out_proj(norm(delta_rule(silu(conv(q, k, v)), alpha, beta)) * silu(gate)).

    The state is the last inputs of the convolution, and S of each head, (H, D_k, D_v).
    """

    def __init__(self, spec: DeltaNet, config: DecoderConfig, state: int) -> None:
        super().__init__()
        self.spec, self.state = spec, state
        self.in_proj = Linear(config.dim, spec.convolved)
        self.gate = Linear(config.dim, spec.inner)
        self.a = Linear(config.dim, spec.heads)
        self.b = Linear(config.dim, spec.heads)
        self.conv = DepthwiseConv(spec.convolved, spec.width, bias=False)
        self.dt = Vector(spec.heads)
        self.A = Vector(spec.heads)
        self.norm = RMSNorm((spec.value_dim,), config.norm_eps)
        self.out_proj = Linear(spec.inner, config.dim)

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        mixed = batch.recur(self.state, self._mix, self.in_proj(x), self.a(x), self.b(x))
        heads = mixed.view(len(x), self.spec.heads, -1)  # (rows, H, D_v)
        out: Tensor = self.out_proj(self.norm(heads).flatten(1) * F.silu(self.gate(x)))
        return out

    def _mix(self, inputs: Parts, state: Parts) -> tuple[Tensor, Parts]:
        """inputs: (B, T, convolved), (B, T, H), (B, T, H)."""
        spec, (conv, a, b), dtype = self.spec, inputs, state[1].dtype
        shape = conv.shape[:2]
        conv, last = self.conv(conv, state[0])
        q, k, v = F.silu(conv).to(dtype).tensor_split([spec.keys, 2 * spec.keys], dim=-1)
        q, k = (_unit(part.reshape(*shape, spec.key_heads, -1)) for part in (q, k))  # (B, T, G, D_k)
        v = v.reshape(*shape, spec.heads, -1)  # (B, T, H, D_v)
        log_alpha = self.A.weight.to(dtype) * F.softplus(a.to(dtype) + self.dt.weight.to(dtype))  # (B, T, H)
        o, heads = delta_rule(q * spec.key_dim**-0.5, k, v, log_alpha, b.to(dtype).sigmoid(), state[1])
        return o.flatten(2).to(conv.dtype), (last, heads)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run S_t = alpha_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T, o_t = S_t^T q_t over positions.

    That is equation 10 of the paper, for the transpose of its S. One position is a step, more are computed in chunks.

    q, k: (B, T, G, D_k); H / G neighbouring heads share them. v: (B, T, H, D_v). log_alpha: the logarithms of the
    decays, (B, T, H). beta: (B, T, H). state: S before the first position, (B, H, D_k, D_v).
    Returns o, (B, T, H, D_v), and the last S.
    """
    share = v.shape[2] // k.shape[2]
    q, k = (part.repeat_interleave(share, dim=2) for part in (q, k))  # (B, T, H, D_k)
    run = step if v.shape[1] == 1 else run_chunk
    outputs = []
    for start in range(0, v.shape[1], _CHUNK):
        chunk = (part[:, start : start + _CHUNK].transpose(1, 2) for part in (q, k, v, log_alpha, beta))
        q_, k_, v_, log_alpha_, beta_ = chunk  # (B, H, T, D_k) twice, (B, H, T, D_v), (B, H, T) twice
        output, state = run(q_, k_, v_, log_alpha_, beta_, state)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), state


def step(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Do one position as the recurrence says. The arguments are those of `run_chunk`, with T = 1."""
    state = log_alpha.exp()[..., None] * state
    u = beta[..., None] * (v - k @ state)  # (B, H, 1, D_v): what is written to k, less what is there
    state = state + k.transpose(-1, -2) @ u
    return q @ state, state


def run_chunk(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Do T positions at once, in the WY form (section 3.3 of the paper; Yang et al. 2024, arXiv:2406.06484).

    Position t writes u_t to k_t. That erases what earlier ones wrote there, so the rows of U solve a triangular system.

    q, k: (B, H, T, D_k). v: (B, H, T, D_v). log_alpha, beta: (B, H, T). state: (B, H, D_k, D_v).
    Returns (B, H, T, D_v), and the state after the last position.
    """
    decay = segment_sums(log_alpha).exp()  # (B, H, T, T): alpha_(s+1) ... alpha_t
    since = log_alpha.cumsum(-1).exp()[..., None]  # (B, H, T, 1): alpha_1 ... alpha_t
    beta, keys = beta[..., None], k.transpose(-1, -2)
    erased = (beta * (k @ keys) * decay).tril(-1)  # (B, H, T, T)
    written = beta * (v - since * (k @ state))  # (B, H, T, D_v)
    u = torch.linalg.solve_triangular(erased, written, upper=False, unitriangular=True)
    o = since * (q @ state) + ((q @ keys) * decay).tril() @ u
    return o, since[..., -1:, :] * state + (k * decay[..., -1, :, None]).transpose(-1, -2) @ u


def _unit(x: Tensor) -> Tensor:
    """Scale vectors to length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _UNIT_EPS)
