"""A small model with its own KV cache, as a template: copy it, and put your model and your cache into it.

    kvgen compare --model docs/examples/my_model.py:factory --ids -p "5 17 3"

kvgen calls `factory()` once, and then `model(ids, cache)` for each step, always with the WHOLE sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCAB, CONTEXT, DIM, HEADS, LAYERS = 64, 512, 64, 4, 2


@dataclass
class Cache:
    """What the model keeps between calls. kvgen passes it back without looking inside, except at `computed`."""

    ids: Tensor  # (B, length): the text that keys and values were computed from
    layers: list[tuple[Tensor, Tensor]]  # keys and values of each layer, (B, H, length, D)
    computed: int  # positions that the last call computed; optional: `kvgen compare` shows ? without it


class Model(nn.Module):
    # All of these are optional. Without them, `kvgen compare` tests less, and says so.
    vocab_size = VOCAB
    context_length = CONTEXT
    changes_at = ()  # lengths at which the model starts to compute differently, such as windows: here none
    rewinds = True  # `forward` compares `ids` with its cached text, so the next text may be shorter or edited
    # lossy = "..."; cannot_cache = "...": reasons why the cache is lossy, or why the model cannot cache

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, DIM), nn.Embedding(CONTEXT, DIM)
        self.qkv = nn.ModuleList(nn.Linear(DIM, 3 * DIM) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Return logits, (B, m, vocab) with m >= 1, and the cache for the next call.

        ids: (B, n) int64, the whole sequence; there may be several rows, and several new tokens. cache: None, or what
        the last call returned. positions: (n,) int64, of the whole sequence; optional: with this argument, the
        diagnosis can tell wrong positions from other faults.
        """
        known = 0 if cache is None else common_prefix(cache.ids, ids)
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        x = self.tokens(ids[:, known:]) + self.positions(positions[known:])  # (B, m, DIM): the new positions alone
        layers = []
        for i in range(LAYERS):
            q, k, v = self.qkv[i](x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)  # (B, H, m, D)
            if cache is not None:
                old_keys, old_values = cache.layers[i]
                k = torch.cat((old_keys[:, :, :known], k), dim=2)  # (B, H, n, D)
                v = torch.cat((old_values[:, :, :known], v), dim=2)
            layers.append((k, v))
            # Not `is_causal=True`: torch aligns that mask to the first key, but the new queries are the last ones.
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(known)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            x = x + nn.functional.gelu(self.out[i](mixed.transpose(1, 2).flatten(2)))
        return self.head(x), Cache(ids.clone(), layers, ids.shape[1] - known)


def common_prefix(cached: Tensor, ids: Tensor) -> int:
    """Length of the prefix to reuse. At least the last position is computed, because its logits are needed."""
    if cached.shape[0] != ids.shape[0]:
        return 0
    limit = min(cached.shape[1], ids.shape[1] - 1)
    differs = (cached[:, :limit] != ids[:, :limit]).any(dim=0).nonzero()
    return int(differs[0]) if len(differs) else limit


def factory() -> Model:
    torch.manual_seed(0)  # random weights; load yours instead
    return Model().eval()  # a new module is in training mode, where dropout makes every comparison meaningless
