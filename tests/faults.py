"""A correct decoder with a plain cache of its own, and ways to break that cache.

The model is what a user would bring: a torch module with the contract's signature, whose cache is a small object.
`fault` names one thing that is done wrongly; None is the correct model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

# fault -> the findings that name it rightly; `unexplained` is never wrong, and never a name. "lookup wrong" is a class
# of causes, not one of them.
FAULTS: dict[str, set[str]] = {
    "offset one too far": {"offset wrong"},
    "offset one too short": {"offset wrong"},
    "positions restart at 0": {"offset lost"},
    "position stays at the prompt's end": {"offset wrong"},
    "all keys at one position": {"order lost", "lookup wrong"},
    "no mask in multi-token calls": {"multi-token calls"},
    "newest key masked out": {"lookup wrong"},
    "key-value heads swapped": {"values wrong"},
    "keys and values of another layer": {"values wrong"},
    "newest token never stored": {"stale context", "short context"},
    "a row not updated": {"stale context", "short context", "beyond a length"},
    "one layer not cached": {"lookup wrong"},
    "context dropped": {"context lost"},
    "window of 8": {"beyond a length"},
    "first token evicted": {"short context"},
    "prompt cut in half": {"prompt cached wrongly"},
    "only the last of several stored": {"multi-token calls"},
    "edit keeps the old suffix": {"edits not noticed"},
    "rows of a batch rolled": {"rows mixed"},
    "float16 accumulation": {"lower precision"},
    "8-bit cache": {"lower precision"},
    "dropout on in cached calls": {"not deterministic"},
    "logits of the position before": {"stale context"},
    "ring buffer of 24 wraps": {"beyond a length"},
    "cached keys rotated twice": {"lookup wrong"},
}


@dataclass(frozen=True)
class Cache:
    ids: Tensor  # (B, n)
    keys: tuple[Tensor, ...]  # (B, H_kv, n, D) for each layer, rotated
    values: tuple[Tensor, ...]
    prompt: int


class SmallDecoder(nn.Module):
    """A pre-norm decoder with rotary positions and grouped-query attention."""

    rewinds = True

    def __init__(self, fault: str | None = None, *, layers: int = 3, heads: int = 4, kv_heads: int = 2, seed: int = 0):
        super().__init__()
        assert fault is None or fault in FAULTS
        self.fault, self.layers, self.heads, self.kv_heads = fault, layers, heads, kv_heads
        self.size, self.dim, self.vocab_size = 8, 32, 61
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * columns**-0.5 * 1.5)

        self.embedding = nn.Parameter(torch.randn(self.vocab_size, self.dim, generator=generator))
        width, kv_width = heads * self.size, kv_heads * self.size
        self.q = nn.ParameterList(weight(width, self.dim) for _ in range(layers))
        self.k = nn.ParameterList(weight(kv_width, self.dim) for _ in range(layers))
        self.v = nn.ParameterList(weight(kv_width, self.dim) for _ in range(layers))
        self.out = nn.ParameterList(weight(self.dim, width) for _ in range(layers))
        self.up = nn.ParameterList(weight(64, self.dim) for _ in range(layers))
        self.down = nn.ParameterList(weight(self.dim, 64) for _ in range(layers))
        self.head = weight(self.vocab_size, self.dim)
        self.eval()

    def forward(self, ids: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> tuple[Tensor, Cache]:
        known = 0 if cache is None else self.known(ids, cache)
        cached = known > 0 and cache is not None
        if cached and known < cache.ids.shape[1] and self.fault != "edit keeps the old suffix":
            cache = replace(
                cache,
                keys=tuple(k[:, :, :known] for k in cache.keys),
                values=tuple(v[:, :, :known] for v in cache.values),
            )
        new = ids[:, known:]
        count = new.shape[1]
        start = self.first_position(known, cache)
        positions = torch.arange(start, start + count) if positions is None else positions[known:]
        x = self.embedding[new]
        turns = turns_at(positions, self.size // 2, x.dtype)
        keys, values = [], []
        for layer in range(self.layers):
            a = norm(x)
            q = self.split(a @ self.q[layer].T, self.heads)
            k = self.split(a @ self.k[layer].T, self.kv_heads)
            v = self.split(a @ self.v[layer].T, self.kv_heads)
            q, k = turned(torch.cat((q, k), 1), *turns).split((self.heads, self.kv_heads), 1)
            all_k, all_v = self.join(layer, k, v, cache if cached else None)
            x = x + self.attend(q, all_k, all_v, cached) @ self.out[layer].T
            x = x + F.silu(norm(x) @ self.up[layer].T) @ self.down[layer].T
            stored_k, stored_v = self.store(all_k, all_v, cached, count, known)
            keys.append(stored_k)
            values.append(stored_v)
        if cached and self.fault == "dropout on in cached calls":
            x = F.dropout(x, 0.2, training=True)
        logits = norm(x) @ self.head.T
        if cached and self.fault == "logits of the position before" and count == 1:
            logits = self(ids[:, :-1], None)[0][:, -1:]
        prompt = cache.prompt if cached else ids.shape[1]
        return logits, Cache(ids.clone(), tuple(keys), tuple(values), prompt)

    def known(self, ids: Tensor, cache: Cache) -> int:
        limit = min(cache.ids.shape[1], ids.shape[1] - 1)
        if cache.ids.shape[0] != ids.shape[0]:
            return 0
        if self.fault == "edit keeps the old suffix":
            return limit
        same = (cache.ids[:, :limit] == ids[:, :limit]).all(0)
        return int(same.long().cumprod(0).sum())

    def first_position(self, known: int, cache: Cache | None) -> int:
        if known == 0 or cache is None:
            return 0
        return {
            "offset one too far": known + 1,
            "offset one too short": known - 1,
            "positions restart at 0": 0,
            "position stays at the prompt's end": cache.prompt,
        }.get(self.fault or "", known)

    def join(self, layer: int, k: Tensor, v: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Cached keys and values with the new ones behind them."""
        if cache is None:
            return k, v
        if self.fault == "context dropped" or (self.fault == "one layer not cached" and layer == 1):
            return k, v
        source = (layer + 1) % self.layers if self.fault == "keys and values of another layer" else layer
        old_k, old_v = cache.keys[source], cache.values[source]
        if self.fault == "key-value heads swapped":
            old_k, old_v = old_k.flip(1), old_v.flip(1)
        if self.fault == "rows of a batch rolled":
            old_k, old_v = old_k.roll(1, 0), old_v.roll(1, 0)
        if self.fault == "cached keys rotated twice":
            old_k = rotate(old_k, torch.arange(old_k.shape[2]))
        if self.fault == "8-bit cache":
            old_k, old_v = eight_bits(old_k), eight_bits(old_v)
        if self.fault == "all keys at one position":
            old_k = rotate(old_k, -torch.arange(old_k.shape[2]))
            k = rotate(k, -torch.full((k.shape[2],), old_k.shape[2]))
        return torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cached: bool) -> Tensor:
        groups = self.heads // self.kv_heads
        new, total = q.shape[2], k.shape[2]
        mask = causal_mask(new, total)
        if cached and self.fault == "no mask in multi-token calls":
            mask = torch.ones_like(mask)
        if cached and self.fault == "newest key masked out":
            mask = mask & ~torch.eye(new, total, dtype=torch.bool).roll(total - new, 1)
        if cached and self.fault == "all keys at one position":
            q = rotate(q, -torch.arange(total - new, total))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if cached and self.fault == "float16 accumulation":
            q, k, v = q.half(), k.half(), v.half()
        mixed = F.scaled_dot_product_attention(q, k, v, mask).to(self.head.dtype)
        return mixed.transpose(1, 2).flatten(2)

    def store(self, k: Tensor, v: Tensor, cached: bool, count: int, known: int) -> tuple[Tensor, Tensor]:
        """What of all keys and values the cache keeps."""
        total = k.shape[2]
        keep: Tensor | slice = slice(None)
        if cached and self.fault == "newest token never stored":
            keep = slice(-count)
        elif self.fault == "window of 8":
            keep = slice(-8, None)
        elif self.fault == "first token evicted" and not cached:
            keep = slice(1, None)
        elif self.fault == "prompt cut in half" and not cached:
            keep = slice(total // 2, None)
        elif cached and self.fault == "only the last of several stored":
            keep = torch.tensor([*range(total - count), total - 1])
        elif self.fault == "a row not updated" and total > 4:
            keep = torch.tensor([*range(4), 3, *range(5, total)])
        elif self.fault == "ring buffer of 24 wraps":
            keep = slice(-24, None)
        return k[:, :, keep], v[:, :, keep]

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.size).transpose(1, 2)


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


@cache
@torch.inference_mode(False)
def causal_mask(new: int, total: int) -> Tensor:
    return torch.ones(new, total, dtype=torch.bool).tril(total - new)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    return turned(x, *turns_at(positions, x.shape[-1] // 2, x.dtype))


def turns_at(positions: Tensor, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (n, half) each."""
    angles = torch.outer(positions.to(dtype), 10.0 ** (-torch.arange(half, dtype=dtype) / half))
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def eight_bits(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale
