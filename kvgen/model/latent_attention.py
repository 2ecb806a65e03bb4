"""Multi-head latent attention. Past positions stay latents: their keys and values are never made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Linear, RMSNorm, rotate
from kvgen.model.mixers import LatentAttention
from kvgen.model.spans import Pass, Span


class LatentAttentionModule(nn.Module):
    """The module of `mixers.LatentAttention` (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    With the latent c of a position, head h has the key K_h c and the value V_h c, which are linear in c. So q . K_h c
    is (K_h^T q) . c, and the weighted sum of values is V_h times that of latents: queries and outputs are projected
    instead of all past positions. A prompt is computed in the same way: in the short chunks that a CPU takes, it costs
    less than making the keys and values of all positions for each chunk.
    """

    def __init__(self, spec: LatentAttention, config: DecoderConfig, state: int, name: str = "attn") -> None:
        super().__init__()
        self.spec, self.state = spec, state
        dim, biases = config.dim, config.biases
        queries = spec.heads * spec.head_dim
        if spec.query_latent_dim is None:
            self.q = Linear(dim, queries, bias=f"{name}.q" in biases)
        else:
            self.q_a = Linear(dim, spec.query_latent_dim, bias=f"{name}.q_a" in biases)
            self.q_a_norm = RMSNorm((spec.query_latent_dim,), spec.norm_eps)
            self.q_b = Linear(spec.query_latent_dim, queries, bias=f"{name}.q_b" in biases)
        self.kv_a = Linear(dim, spec.latent_dim + spec.rotated, bias=f"{name}.kv_a" in biases)
        self.kv_a_norm = RMSNorm((spec.latent_dim,), spec.norm_eps)
        self.k_b = Linear(spec.latent_dim, spec.heads * spec.key_dim)
        self.v_b = Linear(spec.latent_dim, spec.heads * spec.value_dim)
        self.output = Linear(spec.heads * spec.value_dim, dim, bias=f"{name}.output" in biases)

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        spec, rotation = self.spec, batch.rotations[self.spec.rotary]
        q = self.q(x) if spec.query_latent_dim is None else self.q_b(self.q_a_norm(self.q_a(x)))
        q, turned = q.view(len(x), spec.heads, -1).split([spec.key_dim, spec.rotated], dim=-1)  # (rows, H, D) each
        latents, keys = self.kv_a(x).split([spec.latent_dim, spec.rotated], dim=-1)
        latents, keys = self.kv_a_norm(latents), rotate(keys[:, None], *rotation)  # (rows, C), (rows, 1, R)
        k_b = self.k_b.weight.view(spec.heads, spec.key_dim, spec.latent_dim)
        q = torch.einsum("thd,hdc->thc", q, k_b)  # (rows, H, C)
        masks = batch.shared.get(LatentAttention)
        if masks is None:
            masks = batch.shared[LatentAttention] = [_later_positions(span, x.device) for span in batch.spans]
        rows = [span.rows for span in batch.spans]
        new = (part.split(rows) for part in (q, rotate(turned, *rotation), keys, latents))
        read = torch.cat([self._attend(*part) for part in zip(batch.spans, masks, *new, strict=True)])  # (rows, H, C)
        v_b = self.v_b.weight.view(spec.heads, spec.value_dim, spec.latent_dim)
        out: Tensor = self.output(torch.einsum("thc,hdc->thd", read, v_b).flatten(1))
        return out

    def _attend(self, span: Span, later: Tensor | None, q: Tensor, turned: Tensor, *new: Tensor) -> Tensor:
        """Return the weighted sum of latents of each head, (B * T, H, C).

        q, turned: queries of latents and of shared keys, (B * T, H, D) each. new: shared keys and latents. Scores are
        in fp32 or wider.
        """
        batch, count = span.new.shape
        stored = span.cache.append(self.state, *(part.view(batch, 1, count, -1) for part in new))
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, latents = (part[:, 0].to(wide) for part in stored)  # (B, S, R), (B, S, C)
        q, turned = (part.reshape(batch, count * self.spec.heads, -1).to(wide) for part in (q, turned))
        scale = self.spec.head_dim**-0.5 if self.spec.scale is None else self.spec.scale
        scores = (q @ latents.mT + turned @ keys.mT).view(batch, count, self.spec.heads, -1) * scale
        if later is not None:
            scores = scores.masked_fill(later, float("-inf"))
        read = scores.softmax(-1).flatten(1, 2) @ latents  # (B, T * H, C)
        return read.view(span.rows, self.spec.heads, -1).to(new[0].dtype)


def _later_positions(span: Span, device: torch.device) -> Tensor | None:
    """Return which of S positions come after each of T new ones, (T, 1, S) bool; None if none do."""
    new, past = span.new.shape[1], span.cache.length
    if new == 1:
        return None
    positions = torch.arange(past + new, device=device)
    return positions > positions[past:, None, None]
