"""Attention to the keys and values of an earlier layer (Brandon et al. 2024, arXiv:2405.12981)."""

from __future__ import annotations

from torch import Tensor

from kvgen.model.attention import QueryModule
from kvgen.model.config import DecoderConfig
from kvgen.model.mixers import SharedAttention
from kvgen.model.spans import Pass, Span


class SharedAttentionModule(QueryModule):
    """The module of `mixers.SharedAttention`: it reads what an earlier layer has appended to each span's cache."""

    def __init__(self, spec: SharedAttention, config: DecoderConfig) -> None:
        super().__init__(spec.attention, config, spec.state, "attn")

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: the new positions of all spans, (rows, dim). Returns (rows, dim)."""
        return self.attend(x, batch)

    def keys_and_values(self, span: Span, *new: Tensor) -> tuple[Tensor, Tensor]:
        return span.cache.read(self.state, span.new.shape[1], self.q.weight.dtype)
