"""Causal grouped-query attention over a KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.causal_lm import Pass, Span
from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Linear, make_norm, rotate
from kvgen.model.mixers import Attention


class AttentionModule(nn.Module):
    """The module of `config.Attention`. It appends the new keys and values to each span's cache."""

    def __init__(self, spec: Attention, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        queries, keys, biases = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, config.biases
        self.q = Linear(config.dim, queries, bias="attn.q" in biases)
        self.k = Linear(config.dim, keys, bias="attn.k" in biases)
        self.v = Linear(config.dim, keys, bias="attn.v" in biases)
        self.output = Linear(queries, config.dim, bias="attn.output" in biases)
        self.q_norm = _qk_norm(spec, config, spec.heads, bias="attn.q_norm" in biases)
        self.k_norm = _qk_norm(spec, config, spec.kv_heads, bias="attn.k_norm" in biases)

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        spec = self.spec
        q, k, v = self.q(x), self.k(x), self.v(x)
        if spec.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(len(x), -1, spec.head_dim) for part in (q, k, v))  # (rows, H, D), (rows, H_kv, D)
        if spec.qk_norm in ("head", "each-head"):
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rotary is not None:
            q = rotate(q, *batch.rotations[spec.query_rotary or spec.rotary])
            k = rotate(k, *batch.rotations[spec.rotary])
        if spec.qk_norm == "rotated-head":
            q, k = self.q_norm(q), self.k_norm(k)
        masks = batch.shared.get(spec)
        if masks is None:
            sizes = [(span.new.shape[1], span.cache.length) for span in batch.spans]
            masks = batch.shared[spec] = [attention_mask(spec, *size, x.device) for size in sizes]
        rows = [span.rows for span in batch.spans]
        parts = zip(batch.spans, masks, q.split(rows), k.split(rows), v.split(rows), strict=True)
        out: Tensor = self.output(torch.cat([self._attend_span(*part) for part in parts]))
        return out

    def _attend_span(self, span: Span, mask: Tensor | None, *rows: Tensor) -> Tensor:
        """rows: queries, keys and values of one span, (B * T, H, D) each. Returns (B * T, H * D)."""
        q, k, v = (part.view(*span.new.shape, *part.shape[1:]).transpose(1, 2) for part in rows)  # (B, H, T, D)
        k, v = span.cache.append(self.layer, k, v)  # (B, H_kv, S, D)
        return self._attend(q, k, v, mask).transpose(1, 2).reshape(span.rows, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, _, new, _ = q.shape
        if self.spec.softcap is not None:
            return self._attend_capped(q, k, v, mask, self.spec.softcap)
        if new == 1:
            # One query sees every key, so the heads of a group can be the rows of one product. In bf16 on a CPU this
            # is up to seven times as fast as enable_gqa.
            grouped = q.reshape(batch, self.spec.kv_heads, -1, self.spec.head_dim)  # (B, H_kv, G, D)
            return F.scaled_dot_product_attention(grouped, k, v, scale=self.spec.scale).view(q.shape)
        causal, scale = mask is None, self.spec.scale
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)

    def _attend_capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float) -> Tensor:
        """Attention with soft-capped scores, which scaled_dot_product_attention does not support."""
        batch, new = q.shape[0], q.shape[2]
        scale = self.spec.head_dim**-0.5 if self.spec.scale is None else self.spec.scale
        grouped = q.reshape(batch, self.spec.kv_heads, -1, self.spec.head_dim)  # (B, H_kv, G * T, D)
        scores = (grouped @ k.transpose(-1, -2)).view(batch, self.spec.kv_heads, -1, new, k.shape[2]) * scale
        scores = cap * torch.tanh(scores / cap)  # (B, H_kv, G, T, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return (weights.flatten(2, 3) @ v).view(q.shape)


def attention_mask(spec: Attention, new: int, past: int, device: torch.device) -> Tensor | None:
    """Return which of the S keys from `KVCache.append` each of `new` queries attends to, after `past` positions.

    (new, S) bool. None if no mask is needed: for one query, which sees all keys, and for plain causal attention.
    """
    window = spec.window
    total = past + new if window is None else min(past, window - 1) + new
    plainly_causal = new == total and (window is None or new <= window) and spec.softcap is None
    if new == 1 or plainly_causal:
        return None
    rows = torch.arange(total - new, total, device=device)[:, None]
    distance = rows - torch.arange(total, device=device)  # (new, S)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _qk_norm(spec: Attention, config: DecoderConfig, heads: int, bias: bool) -> nn.Module:
    if spec.qk_norm is None:
        return nn.Identity()
    each, every = (heads, spec.head_dim), (heads * spec.head_dim,)
    shape = {"each-head": each, "all": every}.get(spec.qk_norm, (spec.head_dim,))
    return make_norm(config.norm, shape, config.norm_eps, bias=bias)
