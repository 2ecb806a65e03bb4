"""Causal grouped-query attention over a KV cache. The only writer of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.causal_lm import Pass, Span
from kvgen.model.config import Attention, DecoderConfig
from kvgen.model.layers import L2Norm, Linear, make_norm, rotate


class AttentionModule(nn.Module):
    """`kvgen.model.config.Attention`: queries of the new positions against the keys and values that they may see."""

    def __init__(self, spec: Attention, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        queries, keys, biases = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, config.biases
        self.q = Linear(config.dim, queries, bias="attn.q" in biases)
        self.k = Linear(config.dim, keys, bias="attn.k" in biases)
        self.v = Linear(config.dim, keys, bias="attn.v" in biases)
        self.output = Linear(queries, config.dim, bias="attn.output" in biases)
        self.q_norm = _qk_norm(spec, spec.heads, bias="attn.q_norm" in biases)
        self.k_norm = _qk_norm(spec, spec.kv_heads, bias="attn.k_norm" in biases)
        self.norms_all = spec.qk_norm is not None and spec.qk_norm.over == "all"

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.norms_all and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (rows.view(len(x), -1, self.spec.head_dim) for rows in (q, k, v))  # (rows, H, D), (rows, H_kv, D)
        if not self.norms_all and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rotary is not None:
            tables = batch.rotations[self.spec.rotary]
            q, k = rotate(q, *tables), rotate(k, *tables)
        sizes = [span.rows for span in batch.spans]
        parts = zip(batch.spans, self._masks(batch, x), *(rows.split(sizes) for rows in (q, k, v)), strict=True)
        mixed = [self._attend_span(span, mask, *rows) for span, mask, *rows in parts]
        out: Tensor = self.output(torch.cat(mixed))
        return out

    def _masks(self, batch: Pass, x: Tensor) -> list[Tensor | None]:
        """Of each span; layers of one kind share them."""
        masks: list[Tensor | None] | None = batch.shared.get(self.spec)
        if masks is None:
            sizes = [(span.new.shape[1], span.cache.length) for span in batch.spans]
            masks = batch.shared[self.spec] = [attention_mask(self.spec, *size, x.device, x.dtype) for size in sizes]
        return masks

    def _attend_span(self, span: Span, mask: Tensor | None, *rows: Tensor) -> Tensor:
        """rows: queries, keys and values of a span, (B * T, H, D) each. Returns (B * T, H * D)."""
        q, k, v = (part.view(*span.new.shape, *part.shape[1:]).transpose(1, 2) for part in rows)  # (B, H, T, D)
        k, v = span.cache.append(self.layer, k, v)  # (B, H_kv, S, D)
        return self._attend(q, k, v, mask).transpose(1, 2).reshape(span.rows, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, _, new, _ = q.shape
        if self.spec.softcap is not None:
            return self._attend_capped(q, k, v, mask, self.spec.softcap)
        if new == 1:
            # One query sees every key, so the heads that share keys can be the rows of one product. On a CPU in
            # bf16 this is up to seven times as fast as enable_gqa.
            rows = q.reshape(batch, self.spec.kv_heads, -1, self.spec.head_dim)  # (B, H_kv, H / H_kv, D)
            bias = None if mask is None else mask.view(self.spec.kv_heads, -1, mask.shape[-1])  # (H_kv, H / H_kv, S)
            return F.scaled_dot_product_attention(rows, k, v, bias, scale=self.spec.scale).view(q.shape)
        causal, scale = mask is None, self.spec.scale
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)

    def _attend_capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float) -> Tensor:
        """Attention with soft-capped scores, which the fused kernel does not have."""
        batch, new = q.shape[0], q.shape[2]
        scale = self.spec.head_dim**-0.5 if self.spec.scale is None else self.spec.scale
        grouped = q.reshape(batch, self.spec.kv_heads, -1, self.spec.head_dim)  # (B, H_kv, G * T, D)
        scores = (grouped @ k.transpose(-1, -2)).view(batch, self.spec.kv_heads, -1, new, k.shape[2]) * scale
        scores = cap * torch.tanh(scores / cap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return (weights.flatten(2, 3) @ v).view(q.shape)


def attention_mask(spec: Attention, new: int, past: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Which keys the `new` positions behind `past` others may see.

    (new, S) bool, True for yes, over the S keys that `KVCache.append` returns. With ALiBi, (H, new, S) of `dtype`:
    what is added to the scores. None where the kernel needs none: one query sees all that it is handed, and
    queries for all positions are plainly causal.
    """
    window = spec.window
    total = past + new if window is None else min(past, window - 1) + new
    plainly_causal = new == total and (window is None or new <= window) and spec.softcap is None
    if not spec.alibi and (new == 1 or plainly_causal):
        return None
    rows = torch.arange(total - new, total, device=device)[:, None]
    distance = rows - torch.arange(total, device=device)  # (new, S)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if not spec.alibi:
        return visible
    slopes = torch.tensor(spec.alibi, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return torch.where(visible, -distance * slopes[:, None, None], float("-inf")).to(dtype)


def _qk_norm(spec: Attention, heads: int, bias: bool) -> nn.Module | None:
    norm = spec.qk_norm
    if norm is None:
        return None
    shapes = {"head": (spec.head_dim,), "each-head": (heads, spec.head_dim), "all": (heads * spec.head_dim,)}
    if norm.kind == "l2":
        return L2Norm(shapes.get(norm.over))
    return make_norm(norm.kind, shapes[norm.over], norm.eps, bias=bias)
