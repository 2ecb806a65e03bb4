"""One layer of a decoder: how its mixer, its feed-forward layer and the residual stream are put together."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from kvgen.model.altup import AltUpModule
from kvgen.model.config import DecoderConfig
from kvgen.model.laurel import LaurelModule
from kvgen.model.layer_inputs import LayerInputModule
from kvgen.model.layers import make_norm
from kvgen.model.spans import Pass


class Block(nn.Module):
    """One layer: mixer and MLP with their norms and residuals; or one of them with its norm, and what surrounds them.

    number: of the layer. mixer, ffn: their modules.
    """

    def __init__(self, config: DecoderConfig, number: int, mixer: nn.Module | None, ffn: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.attn_norm = _block_norm(config, "attn_norm")
        if mixer is not None:
            self.attn = mixer
            self.post_attention_norm = _block_norm(config, "post_attention_norm")
        if ffn is not None:
            self.ffn = ffn
            self.post_ffw_norm = _block_norm(config, "post_ffw_norm")
        if mixer is not None and ffn is not None:
            self.ffn_norm = _block_norm(config, "ffn_norm")
        inputs, altup = config.layer_inputs, config.altup
        self.laurel = LaurelModule(config) if config.laurel_rank else None
        self.inputs = None if inputs is None else LayerInputModule(inputs, config, number)
        self.altup = None if altup is None else AltUpModule(altup, config)
        self.scale = nn.Parameter(torch.empty(1)) if config.block_scales else None

    def forward(self, x: Tensor, batch: Pass) -> Tensor:
        """x: (rows, dim), or its streams with AltUp, (rows, S, dim). Returns the same."""
        if self.altup is not None:
            x = self.altup(x, partial(self._computed, batch=batch), partial(self._added, batch=batch))
        else:
            x = self._computed(x, batch)
            x = x if self.inputs is None else x + self._added(x, batch)
        return x if self.scale is None else x * self.scale

    def _added(self, x: Tensor, batch: Pass) -> Tensor:
        added: Tensor = torch.zeros_like(x) if self.inputs is None else self.inputs(x, batch)
        return added

    def _computed(self, x: Tensor, batch: Pass) -> Tensor:
        """Mixer and MLP. x: (rows, dim). Returns (rows, dim)."""
        normed = self.attn_norm(x)
        if not hasattr(self, "attn"):
            return x + self._scaled(self.post_ffw_norm(self.ffn(normed)))
        mixed = self.post_attention_norm(self.attn(normed, batch))
        if not hasattr(self, "ffn"):
            return x + self._scaled(mixed)
        if self.config.parallel:
            read = self.ffn_norm(x) if "ffn_norm" in self.config.norms else normed
            return x + self._scaled(mixed + self.post_ffw_norm(self.ffn(read)))
        x = x + self._scaled(mixed)
        x = x if self.laurel is None else self.laurel(x, normed)
        return x + self._scaled(self.post_ffw_norm(self.ffn(self.ffn_norm(x))))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.config.residual_scale == 1 else x * self.config.residual_scale


def _block_norm(config: DecoderConfig, name: str) -> nn.Module:
    if name not in config.norms:
        return nn.Identity()
    return make_norm(config.norm, (config.dim,), config.norm_eps, bias=name in config.biases)
