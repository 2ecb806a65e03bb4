"""Causal grouped-query attention over a KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from kvgen.model.config import DecoderConfig
from kvgen.model.layers import Linear, make_norm, rms_normed, rotate
from kvgen.model.mixers import Attention, Rotary
from kvgen.model.spans import Pass, Span


class QueryModule(nn.Module, ABC):
    """Base class of attentions: queries and the output. Subclasses return the keys and values that they read."""

    def __init__(self, spec: Attention, config: DecoderConfig, state: int, name: str) -> None:
        super().__init__()
        self.spec, self.state, self.eps = spec, state, config.norm_eps
        queries, biases = spec.heads * spec.head_dim, config.biases
        self.q = Linear(config.dim, queries, bias=f"{name}.q" in biases)
        self.output = Linear(queries, config.dim, bias=f"{name}.output" in biases)
        self.gate = Linear(config.dim, queries, bias=f"{name}.gate" in biases) if spec.output_gate else None
        self.q_norm = _qk_norm(spec, config, spec.heads, bias=f"{name}.q_norm" in biases)
        self.sinks = Sinks(spec.heads) if spec.sinks else None

    @abstractmethod
    def keys_and_values(self, span: Span, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the new positions of a span attend to, (B, H_kv, S, D) each. new: as `attend` was given them."""

    def in_heads(self, x: Tensor, norm: nn.Module, rotary: Rotary | None, batch: Pass) -> Tensor:
        """Normalize and rotate projected queries or keys, (rows, H * D): (rows, H, D)."""
        kind = self.spec.qk_norm
        x = norm(x) if kind == "all" else x
        x = x.view(len(x), -1, self.spec.head_dim)
        x = norm(x) if kind in ("head", "each-head") else x
        x = x if rotary is None else rotate(x, *batch.rotations[rotary])
        return norm(x) if kind == "rotated-head" else x

    def attend(self, x: Tensor, batch: Pass, *new: Tensor) -> Tensor:
        """Return the output for x, (rows, dim). new: keys and values, if they are new, (rows, H_kv, D) each."""
        spec = self.spec
        q = self.in_heads(self.q(x), self.q_norm, spec.query_rotary or spec.rotary, batch)
        masks = batch.shared.get(spec)
        if masks is None:
            sizes = [(span.new.shape[1], span.cache.length) for span in batch.spans]
            masks = batch.shared[spec] = [attention_mask(spec, *size, x.device) for size in sizes]
        rows = [span.rows for span in batch.spans]
        parts = zip(batch.spans, masks, *(torch.split(part, rows) for part in (q, *new)), strict=True)
        mixed = torch.cat([self._attend_span(*part) for part in parts])  # (rows, H * D)
        out: Tensor = self.output(mixed if self.gate is None else mixed * torch.sigmoid(self.gate(x)))
        return out

    def _attend_span(self, span: Span, mask: Tensor | None, *rows: Tensor) -> Tensor:
        """rows: queries and new keys and values of one span, (B * T, H, D) each. Returns (B * T, H * D)."""
        q, *new = (part.view(*span.new.shape, *part.shape[1:]).transpose(1, 2) for part in rows)  # (B, H, T, D)
        k, v = self.keys_and_values(span, *new)  # (B, H_kv, S, D)
        return self._attend(q, k, v, mask).transpose(1, 2).reshape(span.rows, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, _, new, _ = q.shape
        if self.spec.softcap is not None or self.sinks is not None:
            return self._attend_stepwise(q, k, v, mask)
        if new == 1:
            # One query sees every key, so the heads of a group can be the rows of one product. In bf16 on a CPU this
            # is up to seven times as fast as enable_gqa.
            grouped = q.reshape(batch, self.spec.kv_heads, -1, self.spec.head_dim)  # (B, H_kv, G, D)
            return F.scaled_dot_product_attention(grouped, k, v, scale=self.spec.scale).reshape(q.shape)
        causal, scale = mask is None, self.spec.scale
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)

    def _attend_stepwise(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with soft-capped scores or sinks, which scaled_dot_product_attention does not support."""
        batch, new, cap = q.shape[0], q.shape[2], self.spec.softcap
        scale = self.spec.head_dim**-0.5 if self.spec.scale is None else self.spec.scale
        grouped = q.reshape(batch, self.spec.kv_heads, -1, self.spec.head_dim)  # (B, H_kv, G * T, D)
        scores = (grouped @ k.transpose(-1, -2)).view(batch, self.spec.kv_heads, -1, new, k.shape[2]) * scale
        scores = scores if cap is None else cap * torch.tanh(scores / cap)  # (B, H_kv, G, T, S)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if self.sinks is not None:
            scores = self.sinks(scores)  # (B, H_kv, G, T, S + 1)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        return (weights[..., : k.shape[2]].flatten(2, 3) @ v).view(q.shape)


class Sinks(nn.Module):
    """See `Attention.sinks`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads))

    def forward(self, scores: Tensor) -> Tensor:
        """Add the score of each head's sink to scores, (B, H_kv, G, T, S): (B, H_kv, G, T, S + 1)."""
        sinks = self.weight.view(*scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sinks), dim=-1)


class AttentionModule(QueryModule):
    """The module of `mixers.Attention`. It appends the new keys and values to each span's cache."""

    def __init__(self, spec: Attention, config: DecoderConfig, state: int, name: str = "attn") -> None:
        super().__init__(spec, config, state, name)
        keys, biases = spec.kv_heads * spec.head_dim, config.biases
        self.k = Linear(config.dim, keys, bias=f"{name}.k" in biases)
        self.v = None if spec.keys_as_values else Linear(config.dim, keys, bias=f"{name}.v" in biases)
        self.k_norm = _qk_norm(spec, config, spec.kv_heads, bias=f"{name}.k_norm" in biases)

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        k = self.k(x)
        v = (k if self.v is None else self.v(x)).view(len(x), -1, self.spec.head_dim)  # (rows, H_kv, D)
        v = rms_normed(v, self.eps) if self.spec.value_norm else v
        return self.attend(x, batch, self.in_heads(k, self.k_norm, self.spec.rotary, batch), v)

    def keys_and_values(self, span: Span, *new: Tensor) -> tuple[Tensor, Tensor]:
        return span.cache.append(self.state, *new)


def attention_mask(spec: Attention, new: int, past: int, device: torch.device) -> Tensor | None:
    """Return which of the S keys from `KVCache.append` each of `new` queries attends to, after `past` positions.

    (new, S) bool. None if no mask is needed: for one query, which sees all keys, and for plain causal attention.
    """
    window = spec.window
    total = past + new if window is None else min(past, window - 1) + new
    plainly_causal = new == total and (window is None or new <= window) and spec.softcap is None and not spec.sinks
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
